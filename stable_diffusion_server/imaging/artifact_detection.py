"""Detects broken output images by histogram: black, or with the artifacts that the original server called bumpy.

The original server rejected an image of 1024 × 1024 pixels if more than 30,000 samples were in the ten darkest of 256
levels and more than 30,000 in the ten brightest (red, green and blue counted together), and more than 80 of the 255
differences between adjacent grey levels' pixel counts exceeded 50. Here the counts are scaled to 1024 × 1024, so the
image may have any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stable_diffusion_server.imaging.resize import Pixels

REFERENCE_PIXELS = 1024 * 1024
MAX_END_SAMPLES = 30_000
MAX_DEVIATIONS = 80
_END_LEVELS = 10
_STEP = 50
# Up to this level a sample looks black on a screen; NaN latents decode to exactly 0.
_BLACK_LEVEL = 2


@dataclass(frozen=True, slots=True)
class ArtifactScore:
    """Counts scaled to 1024 × 1024: samples in the darkest and brightest levels, and uneven grey levels."""

    bottom: float
    top: float
    deviations: int

    @property
    def score(self) -> float:
        """The smallest ratio of a count to its threshold; above 1, all three exceed theirs."""
        return min(self.bottom / MAX_END_SAMPLES, self.top / MAX_END_SAMPLES, self.deviations / MAX_DEVIATIONS)

    @property
    def has_artifacts(self) -> bool:
        """Whether the original server would have rejected the image."""
        return self.score > 1


def is_black(pixels: Pixels) -> bool:
    """Whether no sample of the image (uint8, any shape) is visibly brighter than black."""
    return bool(pixels.max(initial=0) <= _BLACK_LEVEL)


def score_artifacts(pixels: Pixels) -> ArtifactScore:
    """Measure the artifacts of an image (uint8, height × width × 3)."""
    scale = REFERENCE_PIXELS / (pixels.shape[0] * pixels.shape[1])
    samples = np.bincount(pixels.reshape(-1), minlength=256)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    levels = np.bincount(grey.reshape(-1), minlength=256).astype(np.float64)
    # A systematic step between two levels grows with the number of pixels, a random one with its square root (Poisson:
    # the variance is the sum of both counts). Each step is scaled by the share of its square that exceeds the variance.
    steps, variance = np.abs(np.diff(levels)), levels[1:] + levels[:-1]
    systematic = np.maximum(0, 1 - variance / np.maximum(steps**2, 1))
    steps *= systematic * scale + (1 - systematic) * scale**0.5
    return ArtifactScore(
        bottom=float(samples[:_END_LEVELS].sum() * scale),
        top=float(samples[-_END_LEVELS:].sum() * scale),
        deviations=int((steps > _STEP).sum()),
    )
