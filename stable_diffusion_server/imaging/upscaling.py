"""Enlarges images by resampling, without a model."""

from __future__ import annotations

from enum import StrEnum

import cv2
import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.resize import CropBox, Pixels


class Resampling(StrEnum):
    """A filter, by its name in AUTOMATIC1111's API."""

    LANCZOS = "Lanczos"
    NEAREST = "Nearest"


_FILTERS = {
    Resampling.LANCZOS: Image.Resampling.LANCZOS,
    Resampling.NEAREST: Image.Resampling.NEAREST,
}


def crop_to_aspect(pixels: Pixels, width: int, height: int) -> Pixels:
    """Cut off evenly what exceeds the aspect ratio of `width` × `height`; at most the whole image (uint8) is kept.

    Cropped before it is scaled: the scaled image may be far larger than its part.
    """
    input_height, input_width = pixels.shape[:2]
    scale = max(width / input_width, height / input_height)
    crop_width = min(input_width, max(1, round(width / scale)))
    crop_height = min(input_height, max(1, round(height / scale)))
    box = CropBox((input_width - crop_width) // 2, (input_height - crop_height) // 2, crop_width, crop_height)
    return np.ascontiguousarray(box.crop(pixels))


def upscale(pixels: Pixels, width: int, height: int, resampling: Resampling) -> Pixels:
    """Scale an image to `width` × `height`, and cut off evenly what exceeds its aspect ratio.

    Args:
        pixels: uint8, height × width × 3.
        width: Width of the result in pixels.
        height: Height of the result in pixels.
        resampling: The filter.
    """
    part = crop_to_aspect(pixels, width, height)
    return np.asarray(Image.fromarray(part).resize((width, height), _FILTERS[resampling]))


def blend(first: Pixels, second: Pixels, visibility: float) -> Pixels:
    """Mix two images of one size (uint8, height × width × 3); `visibility` is the share of the second, 0 to 1."""
    return np.asarray(cv2.addWeighted(first, 1 - visibility, second, visibility, 0), np.uint8)
