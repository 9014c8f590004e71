"""Control images of tones and colours without a model: tile, blur, grey, a grid of colours, and shuffled content."""

from __future__ import annotations

import cv2
import numpy as np

from stable_diffusion_server.imaging.resize import Pixels

# A larger blur is made from a smaller image: time grows with the standard deviation, and it keeps no details.
_LARGEST_SIGMA = 8.0
# Side of a cell of the colour grid, in pixels.
_CELL = 64
# Pixels across which shuffled content moves together.
_WAVE = 256


def tile_resample(pixels: Pixels, rate: float) -> Pixels:
    """The image scaled down by `rate` (1 to 8), which leaves the details to the model; uint8, height × width × 3."""
    height, width = pixels.shape[:2]
    size = max(1, int(width / rate)), max(1, int(height / rate))
    return pixels if size == (width, height) else np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def blur_gaussian(pixels: Pixels, sigma: float) -> Pixels:
    """The image blurred with a standard deviation of `sigma` pixels; uint8, height × width × 3."""
    height, width = pixels.shape[:2]
    factor = 1
    while sigma / factor > _LARGEST_SIGMA and min(height, width) // (2 * factor) >= 2:
        factor *= 2
    size = max(1, width // factor), max(1, height // factor)
    small = pixels if factor == 1 else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    blurred = cv2.GaussianBlur(small, (0, 0), min(sigma / factor, 4 * _LARGEST_SIGMA))
    if factor > 1:
        blurred = cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(blurred, np.uint8)


def luminance(pixels: Pixels, gamma: float) -> Pixels:
    """The lightness (CIE L*) of an image as grey, raised to `gamma`; uint8, height × width × 3."""
    return _grey(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB), np.uint8), 0, gamma)


def intensity(pixels: Pixels, gamma: float) -> Pixels:
    """The largest channel of each pixel as grey, raised to `gamma`; uint8, height × width × 3."""
    return _grey(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), np.uint8), 2, gamma)


def colour_grid(pixels: Pixels) -> Pixels:
    """The mean colours of cells of 64 × 64 pixels; uint8, height × width × 3."""
    height, width = pixels.shape[:2]
    size = max(1, round(width / _CELL)), max(1, round(height / _CELL))
    cells = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def shuffle(pixels: Pixels, seed: int) -> Pixels:
    """The image bent along random waves, which keeps colours and textures; uint8, height × width × 3.

    The same `seed` bends alike.
    """
    height, width = pixels.shape[:2]
    random = np.random.default_rng(seed)
    ways = []
    for length in (width, height):
        waves = random.random((height // _WAVE + 3, width // _WAVE + 3), np.float32)
        way = np.asarray(cv2.resize(waves, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)
        way -= way.min()
        way *= (length - 1) / max(float(way.max()), 1e-6)
        ways.append(way)
    return np.asarray(cv2.remap(pixels, ways[0], ways[1], cv2.INTER_LINEAR), np.uint8)


def _grey(pixels: Pixels, channel: int, gamma: float) -> Pixels:
    table = (255 * (np.arange(256) / 255) ** gamma).clip(0, 255).astype(np.uint8)
    levels = cv2.LUT(np.ascontiguousarray(pixels[..., channel]), table)
    return np.asarray(cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB), np.uint8)
