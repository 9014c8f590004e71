"""What is seen of a visitor's pictures: edges, what was painted as a mask. Pixels in, small pictures out; no pages."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.imaging import canny, feather_mask
from stable_diffusion_server.ui.image_intake import encoded

Pixels = NDArray[np.uint8]

_LOOK = 768


def edges(pixels: Pixels, low: int, high: int) -> str:
    """The edges of a picture as the server finds them, no larger than is looked at, as a data URL."""
    return _url(canny(_reduced(pixels), low, high), "PNG", compress_level=6)


def painted(mask: Pixels) -> bytes:
    """What was painted (height × width × 3, black where nothing was) as a mask's PNG file: white where anything was.

    Empty where nothing was painted at all.
    """
    flat = _flat(mask)
    return encoded(flat, "PNG", compress_level=1) if flat.any() else b""


def previewed(picture: Pixels, mask: Pixels, feather: int) -> str:
    """The picture with its masked part under black and white stripes, seen on every colour, as a data URL.

    The mask fades in over `feather` pixels. Empty where nothing was painted.
    """
    height, width = picture.shape[:2]
    flat = _flat(mask)
    if not flat.any():
        return ""
    if flat.shape != (height, width):
        flat = np.asarray(cv2.resize(flat, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    return _url(striped(_reduced(picture), _reduced(feather_mask(flat, feather))), "JPEG", quality=85)


def striped(picture: Pixels, mask: Pixels) -> Pixels:
    """A picture (height × width × 3) under stripes where its mask (height × width) is white."""
    down, across = np.indices(mask.shape)
    width = max(4, max(mask.shape) // 48)
    stripes = np.where((down + across) // width % 2, 0, 255).astype(np.float32)[..., None]
    weight = (mask.astype(np.float32) / 255 * 0.6)[..., None]
    return np.rint(picture * (1 - weight) + stripes * weight).astype(np.uint8)


def _flat(mask: Pixels) -> Pixels:
    return np.where(mask.max(axis=2) > 0, 255, 0).astype(np.uint8)


def _reduced(pixels: Pixels) -> Pixels:
    """No larger than is looked at."""
    height, width = pixels.shape[:2]
    scale = _LOOK / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _url(pixels: Pixels, kind: str, **options: int) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded(pixels, kind, **options)).decode()}"
