"""Preparing an input image: resized, cropped around its mask, filled."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import disc
from hypothesis import given
from hypothesis import strategies as st

from stable_diffusion_server.imaging.resize import crop_around, fill_masked, fit_image
from stable_diffusion_server.types import Fill, Fit


@given(st.data())
def test_the_part_around_a_mask_holds_it_all_and_lies_inside_the_picture(data: st.DataObject) -> None:
    """For any margin and aspect ratio."""
    width, height = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    mask = np.zeros((height, width), np.uint8)
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask[top : data.draw(st.integers(top + 1, height)), left : data.draw(st.integers(left + 1, width))] = 255
    box = crop_around(mask, data.draw(st.integers(0, 40)), data.draw(st.floats(0.1, 10)))
    assert box.left >= 0
    assert box.top >= 0
    assert box.left + box.width <= width
    assert box.top + box.height <= height
    assert box.crop(mask).sum() == mask.sum()


def test_the_part_around_a_mask_has_the_asked_aspect_ratio_where_it_fits() -> None:
    """A square for a square, even if the mask is a strip."""
    mask = np.zeros((100, 100), np.uint8)
    mask[40:44, 30:70] = 255
    box = crop_around(mask, 2, 1.0)
    assert (box.width, box.height) == (44, 44)


@pytest.mark.parametrize("fit", list(Fit))
@pytest.mark.parametrize("size", [(96, 80), (40, 80), (200, 10), (1, 1)])
def test_a_picture_is_brought_to_the_size_asked_for(fit: Fit, size: tuple[int, int]) -> None:
    """Exactly, with every resize mode; a mask likewise."""
    picture = disc(96, 80)
    assert fit_image(picture, *size, fit).shape == (size[1], size[0], 3)
    assert fit_image(picture[..., 0], *size, fit).shape == (size[1], size[0])


def test_cropping_and_padding_keep_shapes_and_stretching_does_not() -> None:
    """A disc in a wide image stays a disc in a square one, unless it is stretched."""
    wide = disc(160, 80)

    def sides(fit: Fit) -> tuple[int, int]:
        red = fit_image(wide, 80, 80, fit)[..., 0] > 130
        return int(red.any(axis=0).sum()), int(red.any(axis=1).sum())

    for fit, (across, down) in ((Fit.CROP, (40, 40)), (Fit.PAD, (20, 20)), (Fit.STRETCH, (20, 40))):
        assert sides(fit) == pytest.approx((across, down), abs=2)


@pytest.mark.parametrize("fill", list(Fill))
def test_filling_leaves_what_is_not_masked(fill: Fill) -> None:
    """Only masked pixels change, and with all modes but one they do."""
    picture = disc()
    mask = np.zeros(picture.shape[:2], np.uint8)
    mask[30:50, 40:56] = 255
    result = fill_masked(picture, mask, fill, 3)
    assert (result[mask == 0] == picture[mask == 0]).all()
    assert (result != picture).any() == (fill is not Fill.ORIGINAL)
    assert (fill_masked(picture, mask, fill, 3) == result).all()
