"""Inpainting masks: conversion from images, feathering, and pasting the original image back."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.resize import Pixels

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
    distance = cv2.distanceTransform(binarize_mask(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.rint(mask * np.clip(np.asarray(distance) / (radius + 1), 0, 1)).astype(np.uint8)


def paste_back(drawn: Pixels, image: Pixels, mask: Pixels) -> Pixels:
    """Blend a repainted image over the original one; the original is unchanged where the mask is 0.

    Args:
        drawn: The repainted image, uint8, height × width × 3.
        image: The original image, same shape.
        mask: uint8, height × width; 255 takes `drawn`, 0 takes `image`.
    """
    result = np.where((mask == 255)[..., None], drawn, image)
    soft = (mask > 0) & (mask < 255)
    weight = mask[soft][:, None].astype(np.uint16)
    result[soft] = (drawn[soft] * weight + image[soft] * (255 - weight) + 127) // 255
    return result
