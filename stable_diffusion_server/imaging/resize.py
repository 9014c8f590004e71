"""What is drawn of a picture: brought to a size, cut out around its mask, filled where it is masked. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.canvas import Pixels
from stable_diffusion_server.types import Fill, Fit

_GREY = 127


@dataclass(frozen=True, slots=True)
class CropBox:
    """A part of a picture, in pixels from its upper left corner."""

    left: int
    top: int
    width: int
    height: int

    def crop(self, pixels: Pixels) -> Pixels:
        """That part of a picture (uint8, height × width [× 3])."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]

    def paste(self, part: Pixels, pixels: Pixels) -> Pixels:
        """The picture with that part of it, scaled to its size, in its place."""
        result = pixels.copy()
        if part.shape[:2] != (self.height, self.width):
            part = resize_image(part, self.width, self.height)
        self.crop(result)[...] = part
        return result


def crop_around(mask: Pixels, margin: int, aspect: float) -> CropBox:
    """The part around what a mask (uint8, height × width, somewhere above 0) covers, with a margin in pixels.

    It is widened to the aspect ratio `aspect` (width / height) as far as the picture reaches.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right = max(0, int(columns[0]) - margin), min(width, int(columns[-1]) + 1 + margin)
    top, bottom = max(0, int(rows[0]) - margin), min(height, int(rows[-1]) + 1 + margin)
    wanted_width = max(right - left, round((bottom - top) * aspect))
    wanted_height = max(bottom - top, round((right - left) / aspect))
    left, right = _widened(left, right, wanted_width, width)
    top, bottom = _widened(top, bottom, wanted_height, height)
    return CropBox(left, top, right - left, bottom - top)


def fit_image(pixels: Pixels, width: int, height: int, fit: Fit) -> Pixels:
    """A picture or a mask (uint8, height × width [× 3]) brought to `width` × `height`."""
    own_height, own_width = pixels.shape[:2]
    if (own_width, own_height) == (width, height) or fit is Fit.STRETCH:
        return resize_image(pixels, width, height)
    across, down = width / own_width, height / own_height
    if fit is Fit.CROP:
        scale = max(across, down)
        cut_width, cut_height = min(own_width, round(width / scale)), min(own_height, round(height / scale))
        box = CropBox(
            (own_width - cut_width) // 2, (own_height - cut_height) // 2, max(1, cut_width), max(1, cut_height)
        )
        return resize_image(box.crop(pixels), width, height)
    scale = min(across, down)
    inner = resize_image(pixels, max(1, round(own_width * scale)), max(1, round(own_height * scale)))
    left, top = (width - inner.shape[1]) // 2, (height - inner.shape[0]) // 2
    margins = [(top, height - inner.shape[0] - top), (left, width - inner.shape[1] - left), (0, 0)][: pixels.ndim]
    return np.pad(inner, margins, mode="edge")


def fill_masked(pixels: Pixels, mask: Pixels, fill: Fill, seed: int) -> Pixels:
    """A picture (uint8, height × width × 3) with something else where its mask (height × width) is above 0."""
    where = mask > 0
    result = pixels.copy()
    match fill:
        case Fill.SURROUNDINGS:
            # Colours from the rim, without its structure (Telea 2004, "An Image Inpainting Technique Based on FMM").
            around_it = cv2.inpaint(np.ascontiguousarray(pixels), where.astype(np.uint8), 3, cv2.INPAINT_TELEA)
            result[where] = np.asarray(around_it, np.uint8)[where]
        case Fill.NOISE:
            noise = np.random.default_rng(seed).integers(0, 256, pixels.shape, np.uint8)
            result[where] = noise[where]
        case Fill.GREY:
            result[where] = _GREY
        case Fill.ORIGINAL:
            pass
    return result


def resize_image(pixels: Pixels, width: int, height: int) -> Pixels:
    """A picture or a mask scaled; the same one where it has that size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    how = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


def _widened(start: int, end: int, wanted: int, most: int) -> tuple[int, int]:
    """An interval grown to a length about its middle, pushed back where it would leave 0 .. `most`."""
    wanted = min(wanted, most)
    start = max(0, min(start - (wanted - (end - start)) // 2, most - wanted))
    return start, start + wanted
