"""Is this picture broken? Black, or too bumpy, by its histogram. Pure; what is done about it is decided elsewhere.

The original server called a picture of 1024 × 1024 too bumpy when more than 30,000 samples lay in the ten darkest of
256 levels and more than 30,000 in the ten brightest (of red, green and blue together), and more than 80 of the 255
steps from one grey level to the next changed the count of pixels by more than 50. Here the same is measured as it
would be at 1024 × 1024, whatever the size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

REFERENCE_PIXELS = 1024 * 1024
MAX_END_SAMPLES = 30_000
MAX_DEVIATIONS = 80
_END_LEVELS = 10
_STEP = 50
# A sample this dark cannot be told from 0 on a screen. What a decoder makes of NaN is 0 exactly.
_BLACK_LEVEL = 2


@dataclass(frozen=True, slots=True)
class ArtifactScore:
    """How bumpy a picture is, in the original's counts at 1024 × 1024: samples at both ends, uneven grey levels."""

    bottom: float
    top: float
    deviations: int

    @property
    def score(self) -> float:
        """The measure that is least over its threshold, as a multiple of it: above 1 is too bumpy."""
        return min(self.bottom / MAX_END_SAMPLES, self.top / MAX_END_SAMPLES, self.deviations / MAX_DEVIATIONS)

    @property
    def has_artifacts(self) -> bool:
        """Whether the original's rule speaks."""
        return self.score > 1


def is_black(pixels: Pixels) -> bool:
    """Whether nothing can be seen: no sample of the picture (uint8, any shape) is brighter than black."""
    return bool(pixels.max(initial=0) <= _BLACK_LEVEL)


def score_artifacts(pixels: Pixels) -> ArtifactScore:
    """The measure of a picture (uint8, height × width × 3)."""
    scale = REFERENCE_PIXELS / (pixels.shape[0] * pixels.shape[1])
    samples = np.bincount(pixels.reshape(-1), minlength=256)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    levels = np.bincount(grey.reshape(-1), minlength=256).astype(np.float64)
    # A true step between two levels grows with the number of pixels; one by chance (Poisson: its variance is the sum
    # of both counts) with the root of it. So a step is scaled by how much of its square is more than chance.
    steps, chance = np.abs(np.diff(levels)), levels[1:] + levels[:-1]
    true = np.maximum(0, 1 - chance / np.maximum(steps**2, 1))
    steps *= true * scale + (1 - true) * scale**0.5
    return ArtifactScore(
        bottom=float(samples[:_END_LEVELS].sum() * scale),
        top=float(samples[-_END_LEVELS:].sum() * scale),
        deviations=int((steps > _STEP).sum()),
    )
