"""Pictures of the studio's editors as files and back: what was painted as a mask, edges to look at. No pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.image_processing import canny

Pixels = NDArray[np.uint8]

_LOOK = (768, 768)


def edges(path: Path, low: int, high: int) -> Pixels:
    """The edges of a picture as the server finds them, no larger than is looked at."""
    with Image.open(path) as image:
        image.thumbnail(_LOOK)
        return canny(np.asarray(image.convert("RGB")), low, high)


def painted(layers: Sequence[Pixels], height: int, width: int) -> Pixels:
    """What was painted on layers (height × width × 4, the last their opacity), as a mask: 255 where anything was."""
    mask = np.zeros((height, width), np.uint8)
    for layer in layers:
        mask[layer[..., 3] > 0] = 255
    return mask


def previewed(background: Pixels, mask: Pixels) -> Pixels:
    """The picture with its masked part under black and white stripes, which are seen on every colour."""
    down, across = np.indices(mask.shape)
    width = max(4, max(mask.shape) // 48)
    stripes = np.where((down + across) // width % 2, 0, 255).astype(np.float32)[..., None]
    weight = (mask.astype(np.float32) / 255 * 0.6)[..., None]
    return np.rint(background[..., :3] * (1 - weight) + stripes * weight).astype(np.uint8)


def png(pixels: Pixels) -> bytes:
    """A PNG file of pixels; opacity is left out."""
    target = io.BytesIO()
    Image.fromarray(pixels[..., :3] if pixels.ndim == 3 else pixels).save(target, "PNG", compress_level=1)
    return target.getvalue()


def opened(file: bytes) -> Image.Image:
    """A picture out of a file of our own making."""
    return Image.open(io.BytesIO(file)).convert("RGB")
