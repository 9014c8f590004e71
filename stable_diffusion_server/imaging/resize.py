"""Resizes, crops, pads and fills images and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.types import Fill, Fit

# uint8, height × width × 3, or height × width for a mask.
Pixels = NDArray[np.uint8]

_GREY = 127


@dataclass(frozen=True, slots=True)
class CropBox:
    """A rectangle in an image, in pixels from the upper left corner."""

    left: int
    top: int
    width: int
    height: int

    def crop(self, pixels: Pixels) -> Pixels:
        """A view of the rectangle in `pixels` (uint8, height × width [× 3])."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, part: Pixels, pixels: Pixels) -> Pixels:
        """A copy of `pixels` with `part`, scaled to the rectangle, in the rectangle's place."""
        result = pixels.copy()
        self.crop(result)[...] = resize_image(part, self.width, self.height)
        return result


def crop_around(mask: Pixels, margin: int, aspect: float) -> CropBox:
    """The box around the non-zero part of a mask, with a margin.

    The box is extended to the aspect ratio as far as the image allows.

    Args:
        mask: uint8, height × width, with at least one value above 0.
        margin: Pixels added on each side.
        aspect: Width divided by height.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right = max(0, int(columns[0]) - margin), min(width, int(columns[-1]) + 1 + margin)
    top, bottom = max(0, int(rows[0]) - margin), min(height, int(rows[-1]) + 1 + margin)
    target_width = max(right - left, round((bottom - top) * aspect))
    target_height = max(bottom - top, round((right - left) / aspect))
    left, right = _extend_interval(left, right, target_width, width)
    top, bottom = _extend_interval(top, bottom, target_height, height)
    return CropBox(left, top, right - left, bottom - top)


def fit_image(pixels: Pixels, width: int, height: int, fit: Fit) -> Pixels:
    """Bring an image or a mask (uint8, height × width [× 3]) to `width` × `height` pixels.

    `STRETCH` ignores the aspect ratio, `CROP` cuts off what is too long, `PAD` repeats the border pixels.
    """
    input_height, input_width = pixels.shape[:2]
    if (input_width, input_height) == (width, height) or fit is Fit.STRETCH:
        return resize_image(pixels, width, height)
    if fit is Fit.PAD:
        return pad_image(scale_to_fit(pixels, width, height), width, height)
    scale = max(width / input_width, height / input_height)
    crop_width, crop_height = min(input_width, round(width / scale)), min(input_height, round(height / scale))
    box = CropBox(
        (input_width - crop_width) // 2, (input_height - crop_height) // 2, max(1, crop_width), max(1, crop_height)
    )
    return resize_image(box.crop(pixels), width, height)


def fill_masked(pixels: Pixels, mask: Pixels, fill: Fill, seed: int) -> Pixels:
    """Replace the masked part of an image before it is repainted.

    Args:
        pixels: uint8, height × width × 3.
        mask: uint8, height × width; everything above 0 is replaced.
        fill: What to replace it with.
        seed: Seed of the noise for `Fill.NOISE`.
    """
    masked = mask > 0
    result = pixels.copy()
    match fill:
        case Fill.SURROUNDINGS:
            # Telea 2004, "An Image Inpainting Technique Based on the Fast Marching Method": extends colours inwards.
            inpainted = cv2.inpaint(np.ascontiguousarray(pixels), masked.astype(np.uint8), 3, cv2.INPAINT_TELEA)
            result[masked] = np.asarray(inpainted, np.uint8)[masked]
        case Fill.NOISE:
            noise = np.random.default_rng(seed).integers(0, 256, pixels.shape, np.uint8)
            result[masked] = noise[masked]
        case Fill.GREY:
            result[masked] = _GREY
        case Fill.ORIGINAL:
            pass
    return result


def resize_image(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale an image (Lanczos) or a mask (bilinear); the same array if it already has that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # Lanczos overshoots: that sharpens an image, but puts dark and bright rims around a mask.
    resampling = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), resampling))


def scale_to_fit(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale an image or a mask to the largest size within `width` × `height`, with its aspect ratio kept."""
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    return resize_image(pixels, max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))


def shrink_to_area(pixels: Pixels, area: int) -> Pixels:
    """Scale an image of more than `area` pixels down to that (Lanczos), each side rounded down as diffusers does."""
    height, width = pixels.shape[:2]
    if width * height <= area:
        return pixels
    scale = math.sqrt(area / (width * height))
    return resize_image(pixels, max(1, int(width * scale)), max(1, int(height * scale)))


def pad_image(pixels: Pixels, width: int, height: int, value: int | None = None) -> Pixels:
    """Centre an image or a mask on `width` × `height`; the margins repeat the border pixels, or hold `value`."""
    left, top = (width - pixels.shape[1]) // 2, (height - pixels.shape[0]) // 2
    margins = [(top, height - pixels.shape[0] - top), (left, width - pixels.shape[1] - left), (0, 0)][: pixels.ndim]
    if value is None:
        return np.pad(pixels, margins, mode="edge")
    return np.pad(pixels, margins, constant_values=value)


def _extend_interval(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """Extend an interval to `length` around its middle, and shift it into 0..`limit`."""
    length = min(length, limit)
    start = max(0, min(start - (length - (end - start)) // 2, limit - length))
    return start, start + length
