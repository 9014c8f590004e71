"""Canny edge maps for ControlNet."""

from __future__ import annotations

import cv2
import numpy as np

from stable_diffusion_server.imaging.resize import Pixels


def canny(pixels: Pixels, low: int = 100, high: int = 200) -> Pixels:
    """The edges of an image (Canny 1986) as uint8, height × width × 3: 255 on an edge, else 0.

    The gradient is taken in the channel where it is largest, so red on blue of the same brightness is an edge.

    Args:
        pixels: uint8, height × width × 3, RGB.
        low: Lower hysteresis threshold on the L1 norm of the 3 × 3 Sobel gradient.
        high: Upper hysteresis threshold.
    """
    edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return np.repeat(np.asarray(edges, np.uint8)[..., None], 3, axis=2)
