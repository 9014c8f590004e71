"""Line drawings of an image without a model: white on black, as ControlNets for lines expect them.

All work in 8 bits with a few copies of the image, so that the largest one costs little memory, and in linear time.
"""

from __future__ import annotations

import cv2
import numpy as np

from stable_diffusion_server.imaging.resize import Pixels

_WHITE = 255
# A gradient below it is noise: it is not stretched to white in an image without edges.
_WEAKEST_EDGE = 24
# Share of pixels that may be brighter than the level that becomes white.
_BRIGHTEST = 0.005
_LINE_MIDDLE, _LINE_NOISE, _LINE_FLOOR = 127, 8, 16


def threshold(pixels: Pixels, level: int) -> Pixels:
    """White where all channels are above `level` (0 to 255), else black; uint8, height × width × 3."""
    return _as_rgb(np.where(_darkest(pixels) > level, np.uint8(_WHITE), np.uint8(0)))


def scribble(pixels: Pixels, level: int) -> Pixels:
    """White where a channel is below `level` (0 to 255): the dark lines of a drawing; uint8, height × width × 3."""
    return _as_rgb(np.where(_darkest(pixels) < level, np.uint8(_WHITE), np.uint8(0)))


def scribble_xdog(pixels: Pixels, level: int) -> Pixels:
    """White where the image is darker than its surroundings in all channels: a difference of Gaussians.

    Args:
        pixels: uint8, height × width × 3, RGB.
        level: Twice the difference that makes a line, 1 to 64.
    """
    fine, coarse = cv2.GaussianBlur(pixels, (0, 0), 0.5), cv2.GaussianBlur(pixels, (0, 0), 5.0)
    darker = _darkest(cv2.subtract(coarse, fine, dst=coarse))
    return _as_rgb(np.where(darker > level / 2, np.uint8(_WHITE), np.uint8(0)))


def lineart(pixels: Pixels) -> Pixels:
    """The dark lines of an image on black, as strong as they are; uint8, height × width × 3.

    Lines are what is darker than its surroundings (sigma 6); their median strength becomes middle grey.
    """
    coarse = cv2.GaussianBlur(pixels, (0, 0), 6.0)
    darker = _darkest(cv2.subtract(coarse, pixels, dst=coarse))
    counts = np.bincount(darker.ravel(), minlength=256)
    counts[: _LINE_NOISE + 1] = 0
    typical = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) if counts.any() else 0
    return _as_rgb(_stretched(darker, _LINE_MIDDLE / max(_LINE_FLOOR, typical)))


def softedge_gradient(pixels: Pixels) -> Pixels:
    """Soft edges from the gradient, without a network; uint8, height × width × 3.

    The gradient is that of the channel where it is largest. The strongest edges become white, unless they are faint.
    """
    smooth = cv2.GaussianBlur(pixels, (0, 0), 1.2)
    gradient = cv2.morphologyEx(smooth, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    edges = np.asarray(gradient, np.uint8).max(axis=2)
    counts = np.bincount(edges.ravel(), minlength=256)
    strongest = int(np.searchsorted(np.cumsum(counts), edges.size * (1 - _BRIGHTEST)))
    stretched = _stretched(edges, _WHITE / max(_WEAKEST_EDGE, strongest))
    return _as_rgb(np.asarray(cv2.GaussianBlur(stretched, (0, 0), 1.0), np.uint8))


def thin_lines(edges: Pixels, level: int = 127, sigma: float = 3.0) -> Pixels:
    """Soft edges as drawn lines: their ridges above `level`, drawn broadly in white.

    Args:
        edges: uint8, height × width, white edges.
        level: Ridges below it are left out.
        sigma: Standard deviation of the smoothing, in pixels.
    """
    smooth = np.asarray(cv2.GaussianBlur(edges, (0, 0), sigma), np.uint8)
    ridges = np.zeros_like(smooth)
    for angle in ([[0, 0, 0], [1, 1, 1], [0, 0, 0]], [[0, 1, 0]] * 3, np.eye(3), np.fliplr(np.eye(3))):
        # A ridge is the largest value across some direction.
        dilated = cv2.dilate(smooth, np.array(angle, np.uint8))
        np.copyto(ridges, smooth, where=dilated == smooth)
    lines = np.where(ridges > level, np.uint8(_WHITE), np.uint8(0))
    broad = np.asarray(cv2.GaussianBlur(lines, (0, 0), sigma), np.uint8)
    return np.where(broad > 4, np.uint8(_WHITE), np.uint8(0))


def invert(pixels: Pixels) -> Pixels:
    """The negative, which makes white lines on black of black ones on white; uint8, height × width × 3."""
    return np.asarray(cv2.bitwise_not(pixels), np.uint8)


def _darkest(pixels: Pixels | cv2.typing.MatLike) -> Pixels:
    """The smallest channel of each pixel, height × width."""
    red, green, blue = cv2.split(np.asarray(pixels, np.uint8))
    return np.asarray(cv2.min(cv2.min(red, green), blue), np.uint8)


def _stretched(levels: Pixels, factor: float) -> Pixels:
    table = np.clip(np.arange(256) * factor, 0, _WHITE).astype(np.uint8)
    return np.asarray(cv2.LUT(levels, table), np.uint8)


def _as_rgb(levels: Pixels) -> Pixels:
    return np.asarray(cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB), np.uint8)
