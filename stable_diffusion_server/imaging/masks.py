"""Masks: levels, full masks, feathering, and pasting an image back."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.canvas import Pixels

# Level of grey → level of a mask: 0 up to 32, 255 from 223, straight between.
_MASK_LEVELS = [round(min(max((level - 32) * 255 / 191, 0), 255)) for level in range(256)]


def to_mask(pixels: Pixels, width: int, height: int) -> Pixels:
    """An RGB picture of any size as a mask: uint8, height × width, grey by luma; 255 repaints, 0 keeps.

    Black and white are taken with a margin of an eighth, since a mask that was a JPEG or drawn is never quite either.
    """
    grey = Image.fromarray(pixels).convert("L")
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(grey.point(_MASK_LEVELS))


def binarize_mask(mask: Pixels) -> Pixels:
    """The mask with every grey made white: all that is touched at all."""
    return np.where(mask > 0, np.uint8(255), np.uint8(0))


def feather_mask(mask: Pixels, radius: int) -> Pixels:
    """The mask rising over `radius` pixels from its rim inwards (by Euclidean distance); 0 stays 0 everywhere."""
    if radius == 0:
        return mask
    # A mask that is white to the picture's border has no rim there: pixels beyond the border do not count.
    distance = cv2.distanceTransform(binarize_mask(mask), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.rint(mask * np.clip(np.asarray(distance) / (radius + 1), 0, 1)).astype(np.uint8)


def paste_back(drawn: Pixels, image: Pixels, mask: Pixels) -> Pixels:
    """`drawn` over `image` (both uint8, height × width × 3) by `mask` (height × width): 0 keeps the image exactly."""
    result = np.where((mask == 255)[..., None], drawn, image)
    soft = (mask > 0) & (mask < 255)
    weight = mask[soft][:, None].astype(np.uint16)
    result[soft] = (drawn[soft] * weight + image[soft] * (255 - weight) + 127) // 255
    return result
