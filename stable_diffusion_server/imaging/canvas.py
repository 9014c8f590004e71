"""Canvas planning: the size a model draws, and fitting images to it and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Canvas:
    """The size a model draws at, in pixels; `resampled` when it has to be scaled to the size asked for."""

    width: int
    height: int
    resampled: bool


def plan_canvas(width: int, height: int, native_pixels: int, min_side: int) -> Canvas:
    """The canvas for a picture of `width` × `height` pixels.

    Within the model's budget of `native_pixels` (an area) and not under its `floor` (a side): the next multiple of
    64 up, to be cropped. Else the native size that keeps most of itself when cropped to the asked aspect ratio, to be
    resampled.
    """
    aligned_width, aligned_height = _align_up(width), _align_up(height)
    if aligned_width * aligned_height <= native_pixels and min(aligned_width, aligned_height) >= min_side:
        return Canvas(aligned_width, aligned_height, resampled=False)
    aspect = width / height
    sides = range(_align_up(min_side), max(min_side, native_pixels // min_side) + 1, ALIGNMENT)
    candidates = [(w, h) for w in sides for h in sides if w * h <= native_pixels]
    # What is left of a canvas after cropping to the asked aspect ratio; among equals, the one cheapest to draw.
    drawn_width, drawn_height = max(
        candidates, key=lambda c: (min(c[0], c[1] * aspect) * min(c[1], c[0] / aspect), -c[0] * c[1])
    )
    return Canvas(drawn_width, drawn_height, resampled=True)


def crop_to_size(pixels: Pixels, width: int, height: int, *, resample: bool) -> Pixels:
    """`pixels` (uint8, height × width × 3) centre-cropped to the asked aspect ratio and exactly `width` × `height`.

    Without `resample` no pixel is changed, only cut away; with it the crop is scaled by Lanczos.
    """
    drawn_height, drawn_width = pixels.shape[:2]
    if not resample:
        left, top = (drawn_width - width) // 2, (drawn_height - height) // 2
        return pixels[top : top + height, left : left + width]
    scale = max(width / drawn_width, height / drawn_height)
    crop_width, crop_height = width / scale, height / scale
    left_edge, top_edge = (drawn_width - crop_width) / 2, (drawn_height - crop_height) / 2
    box = (left_edge, top_edge, left_edge + crop_width, top_edge + crop_height)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def to_canvas(pixels: Pixels, canvas: Canvas, *, fill: int | None = None) -> Pixels:
    """The whole picture (uint8, height × width [× 3]) in the middle of a canvas, of which `to_size` is the inverse.

    A canvas without resampling takes it pixel for pixel, another one scaled with its aspect ratio kept.
    Around it its own border is drawn out, or `fill` laid. Where the scaled size is no whole number of pixels, it is
    off by less than half a pixel of the canvas.
    """
    height, width = pixels.shape[:2]
    if canvas.resampled:
        scale = min(canvas.width / width, canvas.height / height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        # Lanczos overshoots, which sharpens a picture and puts shadows around a mask.
        how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.BILINEAR
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), how))
    left, top = (canvas.width - width) // 2, (canvas.height - height) // 2
    margins = [(top, canvas.height - height - top), (left, canvas.width - width - left), (0, 0)][: pixels.ndim]
    if fill is None:
        return np.pad(pixels, margins, mode="edge")
    return np.pad(pixels, margins, constant_values=fill)


def _align_up(side: int) -> int:
    return -(-side // ALIGNMENT) * ALIGNMENT
