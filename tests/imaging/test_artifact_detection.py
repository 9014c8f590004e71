"""Artifact detection: black images, and the original's "bumpy" measure at any size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from fakes import bumpy_pixels, disc
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.imaging.artifact_detection import is_black, score_artifacts


def originals_rule(pixels: NDArray[np.uint8]) -> bool:
    """The original's rule on histogram counts, for images of its own size."""
    picture = Image.fromarray(pixels)
    colours, grey = picture.histogram(), picture.convert("L").histogram()
    bands = [colours[band * 256 : band * 256 + 256] for band in range(3)]
    bottom, top = (sum(sum(band[ends]) for band in bands) for ends in (slice(10), slice(246, 256)))
    deviations = sum(abs(b - a) > 50 for a, b in pairwise(grey))
    return bottom > 30_000 and top > 30_000 and deviations > 80


def scene(seed: int, side: int = 1024) -> NDArray[np.uint8]:
    """An image with soft blobs, with given contrast and grain."""
    chance = np.random.default_rng(seed)
    blobs = chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(blobs).resize((side, side), Image.Resampling.BICUBIC)).astype(float)
    contrast, grain = chance.uniform(0.5, 2.5), chance.choice([0.0, 1.0, 5.0])
    return np.clip(128 + contrast * (soft - 128) + chance.normal(0, grain, soft.shape), 0, 255).astype(np.uint8)


@given(st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_at_the_originals_size_the_verdict_is_the_originals(seed: int) -> None:
    """The same verdict, to the last count, at 1024 × 1024."""
    pixels = scene(seed)
    assert score_artifacts(pixels).has_artifacts is originals_rule(pixels)


@pytest.mark.parametrize("seed", range(8))
def test_the_verdict_is_the_same_at_every_size(seed: int) -> None:
    """An image at half, a quarter and twice the size gets the same verdict, unless it is close to the threshold."""
    pixels = scene(seed)
    measured = score_artifacts(pixels)
    if not 0.6 < measured.score < 1.6:
        others = [np.ascontiguousarray(pixels[::2, ::2]), np.ascontiguousarray(pixels[1::4, 1::4])]
        others.append(pixels.repeat(2, 0).repeat(2, 1))
        assert {score_artifacts(other).has_artifacts for other in others} == {measured.has_artifacts}


@pytest.mark.parametrize("side", [64, 128, 512, 1024])
def test_noise_with_black_and_white_is_too_bumpy_and_flat_shapes_are_not(side: int) -> None:
    """The embedded models' results, discs on backgrounds, pass at every size; noise does not."""
    assert score_artifacts(bumpy_pixels(side, side, ends=0.05)).has_artifacts
    assert score_artifacts(bumpy_pixels(side, side, ends=0.2)).score > 1
    for inside, outside in (("black", "white"), ("red", "blue"), ("white", "black")):
        assert not score_artifacts(disc(side, side, inside, outside)).has_artifacts


def test_both_ends_and_uneven_greys_are_needed() -> None:
    """Much black alone, much white alone, or a ramp of all levels is valid."""
    snow = bumpy_pixels(256, 256, ends=0.05)
    assert not score_artifacts(np.maximum(snow, 12)).has_artifacts
    assert not score_artifacts(np.minimum(snow, 240)).has_artifacts
    ramp = np.repeat(np.tile(np.arange(256, dtype=np.uint8), (256, 1))[..., None], 3, 2)
    assert not score_artifacts(np.ascontiguousarray(ramp)).has_artifacts


def test_a_picture_is_black_when_nothing_can_be_seen() -> None:
    """All zeros, and zeros with rounding errors; one dark grey pixel is enough to pass."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    assert is_black(pixels)
    assert is_black(pixels + 2)
    pixels[5, 6, 1] = 3
    assert not is_black(pixels)
