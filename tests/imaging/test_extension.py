"""Extending an image: its old part stays, new sides are masked, the overlap fades, cells are covered whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_server.imaging.extension import cover_cells, extend_image, extend_mask
from stable_diffusion_server.types import Extension

SIDES = st.integers(0, 40)


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
def test_the_old_part_is_kept_and_every_new_pixel_is_masked(
    left: int, right: int, top: int, bottom: int, overlap: int, width: int, height: int
) -> None:
    """For any sides: the old image lies inside bit for bit, new pixels are 255, and only the overlap rises to them."""
    extension = Extension(left, right, top, bottom, overlap)
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    made = extend_image(image, extension)
    mask = extend_mask(np.zeros((height, width), np.uint8), extension)
    old = np.s_[top : top + height, left : left + width]
    assert made.shape == (*mask.shape, 3) == (height + top + bottom, width + left + right, 3)
    assert (made[old] == image).all()
    outside = np.ones(mask.shape, bool)
    outside[old] = False
    assert (mask[outside] == 255).all()
    y, x = np.mgrid[:height, :width]
    depths = [depth for depth, side in ((x, left), (width - 1 - x, right), (y, top), (height - 1 - y, bottom)) if side]
    nearest = np.min(depths, axis=0) if depths else np.full((height, width), overlap)
    expected = np.rint(255 * (1 - (np.minimum(nearest, overlap) + 1) / (overlap + 1)).clip(0))
    assert (mask[old] == expected).all()
    assert mask[old].max() < 255


def test_a_mask_of_the_caller_stays_beside_the_new_side() -> None:
    """What was masked stays masked, and the ramp does not lower it."""
    mask = np.zeros((20, 20), np.uint8)
    mask[5:9, 1:4] = 255
    made = extend_mask(mask, Extension(left=8, overlap=6))
    assert (made[5:9, 9:12] == 255).all()
    assert (made[:, 14:] == 0).all()
    assert (np.diff(made[0, 8:15].astype(int)) <= 0).all()


@pytest.mark.parametrize(("at", "cell"), [((0, 0), (0, 0)), ((15, 16), (0, 1)), ((31, 47), (1, 2))])
def test_a_cell_that_is_touched_is_covered(at: tuple[int, int], cell: tuple[int, int]) -> None:
    """One masked pixel covers its 16 × 16 cell and no other."""
    mask = np.zeros((32, 48), np.uint8)
    mask[at] = 255
    made = cover_cells(mask)
    expected = np.zeros_like(mask)
    expected[cell[0] * 16 : cell[0] * 16 + 16, cell[1] * 16 : cell[1] * 16 + 16] = 255
    assert made.dtype == np.uint8
    assert (made == expected).all()
