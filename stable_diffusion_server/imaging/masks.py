"""Inpainting masks: conversion from images, feathering, and pasting the original image back."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.resize import Pixels

# Rows that are blended at a time, which bounds the memory of a large image.
_BAND = 64
# Grey level → mask level: 0 up to 32, 255 from 223, linear between.
_MASK_LEVELS = [round(min(max((level - 32) * 255 / 191, 0), 255)) for level in range(256)]


def to_mask(pixels: Pixels, width: int, height: int) -> Pixels:
    """Convert an RGB image of any size to a mask: uint8, height × width; 255 is repainted, 0 is kept.

    The darkest and brightest eighth of the luma levels become 0 and 255, because JPEG compression and drawing tools
    leave black and white inexact.
    """
    grey = Image.fromarray(pixels).convert("L")
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey.point(_MASK_LEVELS))


def binarize_mask(mask: Pixels) -> Pixels:
    """The mask with every value above 0 set to 255."""
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


def feather_mask(mask: Pixels, radius: int) -> Pixels:
    """Ramp the mask up from its edge inwards over `radius` pixels (Euclidean distance); pixels that are 0 stay 0."""
    if radius == 0:
        return mask
    # Pixels outside the image are not 0 for the distance transform, so the mask is not feathered at the image border.
    levels = np.asarray(cv2.distanceTransform(binarize_mask(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)
    # In place: a mask may have 16 million pixels, and ten of them may be feathered at a time.
    levels /= radius + 1
    np.clip(levels, 0, 1, out=levels)
    levels *= mask
    return np.rint(levels, out=levels).astype(np.uint8)


def paste_back(drawn: Pixels, image: Pixels, mask: Pixels) -> Pixels:
    """Blend a repainted image over the original one; the original is unchanged where the mask is 0.

    Args:
        drawn: The repainted image, uint8, height × width × 3.
        image: The original image, same shape.
        mask: uint8, height × width; 255 takes `drawn`, 0 takes `image`.
    """
    result = image.copy()
    for top in range(0, len(mask), _BAND):
        rows = slice(top, top + _BAND)
        if not mask[rows].any():
            continue
        weight = mask[rows][..., None].astype(np.uint16)
        # At most 255 * 255 + 127; exactly one of both images where the weight is 0 or 255.
        result[rows] = (drawn[rows] * weight + image[rows] * (255 - weight) + 127) // 255
    return result
