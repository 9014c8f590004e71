"""What a preprocessor is: the kind of control image it makes, its options, and the files it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging.resize import Pixels

# The shorter side of a control image in pixels; 0 keeps the size of the image.
RESOLUTION = "resolution"
_MOST_PIXELS, _LONGEST_SIDE = 2**24, 16_383

# Turns pixels (uint8, height × width × 3) into a control image, by the values of all options.
DrawControl = Callable[[Pixels, Mapping[str, float]], Pixels]


@dataclass(frozen=True, slots=True)
class PreprocessorOption:
    """A number that a preprocessor takes, with its bounds; `label` is its name in AUTOMATIC1111."""

    name: str
    label: str
    default: float
    low: float
    high: float
    step: float = 1.0


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A model file by its name: it holds one of `words`, without signs and in lower case, and none of `without`."""

    what: str
    words: tuple[str, ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """A way to turn an image into a control image.

    Attributes:
        name: Its own name.
        kind: What it makes: canny, depth, lineart …
        also: Further kinds of ControlNet that its result fits.
        options: Its numbers; `resolution` comes on top.
        aliases: Further names, among them AUTOMATIC1111's.
        draw: Makes the control image in this process; `None` if it takes models.
        needs: The model files, in the order in which `method` takes them.
        method: How a process for models computes it; empty for those with `draw`.
        keeps_size: Whether it has no resolution, since each pixel is changed alone.
    """

    name: str
    kind: str
    also: tuple[str, ...] = ()
    options: tuple[PreprocessorOption, ...] = ()
    aliases: tuple[str, ...] = ()
    draw: DrawControl | None = None
    needs: tuple[NeededFile, ...] = ()
    method: str = ""
    keeps_size: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of ControlNet that it can be used with, its own first."""
        return (self.kind, *self.also)

    def values(self, given: Mapping[str, float], field: str) -> dict[str, float]:
        """The values of all options, defaults for those not given. Raises `InvalidInput` for `field`, naming all."""
        bounds = {option.name: (option.low, option.high) for option in self.options}
        if not self.keeps_size:
            bounds[RESOLUTION] = (0, 2048)
        faults = [
            f"{self.name} has no option {name[:50]!r}; it has {', '.join(bounds) or 'none'}."
            for name in given
            if name not in bounds
        ]
        for name, (low, high) in bounds.items():
            value = given.get(name, low)
            small = name == RESOLUTION and 0 < value < 64
            if not math.isfinite(value) or not low <= value <= high or small:
                least = "0, or 64" if name == RESOLUTION else f"{low:g}"
                faults.append(f"{name} of {self.name} must be {least} to {high:g}.")
        values = {option.name: float(given.get(option.name, option.default)) for option in self.options}
        if values.get("low", 0.0) > values.get("high", math.inf):
            faults.append(f"low of {self.name} must not be above high.")
        if faults:
            raise InvalidInput.from_faults([(field, sentence) for sentence in faults])
        return values if self.keeps_size else {**values, RESOLUTION: float(given.get(RESOLUTION, 0.0))}


def control_size(width: int, height: int, resolution: float, field: str) -> tuple[int, int]:
    """Width and height of an image whose shorter side becomes `resolution` pixels; 0 keeps the size.

    Raises `InvalidInput` for `field` if the result would be too large.
    """
    if resolution == 0:
        return width, height
    scale = resolution / min(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if max(size) > _LONGEST_SIDE or size[0] * size[1] > _MOST_PIXELS:
        sentence = f"The control image would have {size[0]} × {size[1]} pixels; give a smaller resolution."
        raise InvalidInput(sentence, field=field)
    return size


def to_resolution(pixels: Pixels, resolution: float, field: str) -> Pixels:
    """Scale an image (uint8, height × width × 3) so that its shorter side has `resolution` pixels; 0 keeps it."""
    height, width = pixels.shape[:2]
    size = control_size(width, height, resolution, field)
    if size == (width, height):
        return pixels
    smaller = size[0] * size[1] < width * height
    filter_ = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size, interpolation=filter_), np.uint8)
