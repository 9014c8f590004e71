"""Outpainting: extends an image and its mask by new sides, and rounds a mask up to what a model can repaint."""

from __future__ import annotations

import numpy as np

from stable_diffusion_server.imaging.resize import Pixels
from stable_diffusion_server.types import Extension

# Pixels that are repainted together: a latent is 8 × 8 of them, and a transformer takes 2 × 2 latents as one patch.
_CELL = 16


def extend_image(pixels: Pixels, extension: Extension) -> Pixels:
    """Return the image (uint8, height × width × 3) with its new sides, which repeat the border pixels."""
    return np.pad(pixels, [*_margins(extension), (0, 0)], mode="edge")


def extend_mask(mask: Pixels, extension: Extension) -> Pixels:
    """Return the mask (uint8, height × width) with its new sides, which are 255.

    Within the overlap of a new side it rises from 0 towards the side, where it is not higher already.
    """
    mask = np.maximum(mask, _overlap(mask.shape[0], mask.shape[1], extension))
    return np.pad(mask, _margins(extension), constant_values=255)


def cover_cells(mask: Pixels) -> Pixels:
    """Return the mask (uint8, sides multiples of 16) with 255 in each square of 16 × 16 pixels that it touches.

    Latents are repainted or kept as a whole; without this, those that an image's old border crosses would be kept.
    """
    height, width = mask.shape
    touched = mask.reshape(height // _CELL, _CELL, width // _CELL, _CELL).any(axis=(1, 3))
    return np.kron(touched, np.full((_CELL, _CELL), 255, np.uint8)).astype(np.uint8)


def _overlap(height: int, width: int, extension: Extension) -> Pixels:
    """The levels next to the new sides: uint8, height × width."""
    across = _ramp(width, extension.overlap if extension.left else 0)
    across = np.maximum(across, _ramp(width, extension.overlap if extension.right else 0)[::-1])
    down = _ramp(height, extension.overlap if extension.top else 0)
    down = np.maximum(down, _ramp(height, extension.overlap if extension.bottom else 0)[::-1])
    return np.maximum(down[:, None], across[None, :])


def _ramp(length: int, overlap: int) -> Pixels:
    """`length` levels: they fall over `overlap` pixels from nearly 255 and are 0 after them."""
    levels = np.zeros(length, np.uint8)
    falling = np.rint(255 * (1 - np.arange(1, overlap + 1) / (overlap + 1))).astype(np.uint8)
    levels[:overlap] = falling[:length]
    return levels


def _margins(extension: Extension) -> list[tuple[int, int]]:
    return [(extension.top, extension.bottom), (extension.left, extension.right)]
