"""Canvas planning: the size that a model draws at, and conversion between image and canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.resize import Pixels, pad_image, scale_to_fit

# Canvas sides are multiples of this many pixels.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size that a model draws at, in pixels; `resampled` if its output has to be scaled to the requested size."""

    width: int
    height: int
    resampled: bool


def plan_canvas(width: int, height: int, native_pixels: int, min_side: int) -> Canvas:
    """Choose the canvas for an image of `width` × `height` pixels.

    If the requested size, rounded up to multiples of 64, is within the model's limits, the canvas is that size and its
    output is cropped. Otherwise it is the native size that loses the least area when cropped to the requested aspect
    ratio, and its output is resampled.

    Args:
        width: Requested width.
        height: Requested height.
        native_pixels: Largest area that the model draws well, in pixels.
        min_side: Smallest side that the model draws well, in pixels.
    """
    aligned_width, aligned_height = _align_up(width), _align_up(height)
    if aligned_width * aligned_height <= native_pixels and min(aligned_width, aligned_height) >= min_side:
        return Canvas(aligned_width, aligned_height, resampled=False)
    aspect = width / height
    sides = range(_align_up(min_side), max(min_side, native_pixels // min_side) + 1, ALIGNMENT)
    candidates = [(w, h) for w in sides for h in sides if w * h <= native_pixels]
    # The largest area after cropping to the aspect ratio; among equals, the smallest canvas.
    canvas_width, canvas_height = max(
        candidates, key=lambda c: (min(c[0], c[1] * aspect) * min(c[1], c[0] / aspect), -c[0] * c[1])
    )
    return Canvas(canvas_width, canvas_height, resampled=True)


def crop_to_size(pixels: Pixels, width: int, height: int, *, resample: bool) -> Pixels:
    """Crop the centre of a canvas to the requested aspect ratio and size.

    Args:
        pixels: uint8, height × width × 3.
        width: Width of the result in pixels.
        height: Height of the result in pixels.
        resample: Whether to scale the crop to the size (Lanczos); otherwise pixels are only cut off.
    """
    canvas_height, canvas_width = pixels.shape[:2]
    if not resample:
        left, top = (canvas_width - width) // 2, (canvas_height - height) // 2
        return pixels[top : top + height, left : left + width]
    scale = max(width / canvas_width, height / canvas_height)
    # Bounded, since rounding may exceed the canvas by 1 ulp, which Pillow refuses (154 × 1615 from 192 × 1344).
    crop_width, crop_height = min(width / scale, canvas_width), min(height / scale, canvas_height)
    left, top = (canvas_width - crop_width) / 2, (canvas_height - crop_height) / 2
    box = (left, top, min(left + crop_width, canvas_width), min(top + crop_height, canvas_height))
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def to_canvas(pixels: Pixels, canvas: Canvas, *, fill: int | None = None) -> Pixels:
    """Centre an image or a mask (uint8, height × width [× 3]) on a canvas; `crop_to_size` is the inverse.

    If the canvas is resampled, the image is scaled to it with its aspect ratio kept; rounding to whole pixels moves it
    by less than half a pixel. The margins repeat the border pixels, or hold `fill`.
    """
    if canvas.resampled:
        pixels = scale_to_fit(pixels, canvas.width, canvas.height)
    return pad_image(pixels, canvas.width, canvas.height, fill)


def _align_up(side: int) -> int:
    return -(-side // ALIGNMENT) * ALIGNMENT
