"""Previews of uploaded images: edges and painted masks, as data URLs."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.imaging import canny, feather_mask
from stable_diffusion_server.ui.image_intake import encoded

Pixels = NDArray[np.uint8]

_PREVIEW_SIDE = 768


def edges(pixels: Pixels, low: int, high: int) -> str:
    """Return the Canny edges of an image, reduced to preview size, as a data URL."""
    return _url(canny(_reduced(pixels), low, high), "PNG", compress_level=6)


def painted(mask: Pixels) -> bytes:
    """Return a mask's PNG file, white where `mask` (height × width × 3) is not black.

    Empty if nothing was painted.
    """
    flat = _flat(mask)
    return encoded(flat, "PNG", compress_level=1) if flat.any() else b""


def previewed(picture: Pixels, mask: Pixels, feather: int) -> str:
    """Return the image with black and white stripes over its masked part, as a data URL.

    The mask fades in over `feather` pixels. Empty if nothing was painted.
    """
    height, width = picture.shape[:2]
    flat = _flat(mask)
    if not flat.any():
        return ""
    if flat.shape != (height, width):
        flat = np.asarray(cv2.resize(flat, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    return _url(striped(_reduced(picture), _reduced(feather_mask(flat, feather))), "JPEG", quality=85)


def striped(picture: Pixels, mask: Pixels) -> Pixels:
    """Return an image (height × width × 3) with stripes where its mask (height × width) is white."""
    down, across = np.indices(mask.shape)
    width = max(4, max(mask.shape) // 48)
    stripes = np.where((down + across) // width % 2, 0, 255).astype(np.float32)[..., None]
    weight = (mask.astype(np.float32) / 255 * 0.6)[..., None]
    return np.rint(picture * (1 - weight) + stripes * weight).astype(np.uint8)


def _flat(mask: Pixels) -> Pixels:
    return np.where(mask.max(axis=2) > 0, 255, 0).astype(np.uint8)


def _reduced(pixels: Pixels) -> Pixels:
    """Reduce pixels to at most the preview size."""
    height, width = pixels.shape[:2]
    scale = _PREVIEW_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _url(pixels: Pixels, kind: str, **options: int) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(pixels, kind, **options)).decode()}"
