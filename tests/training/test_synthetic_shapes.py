"""The renderer: an image shows what its scene says, at every size."""

import numpy as np
import pytest

from training import synthetic_landscapes, synthetic_shapes

pytestmark = pytest.mark.slow

SIZES = [(128, 128), (256, 256), (384, 256), (256, 384), (512, 320)]


def rng() -> np.random.Generator:
    """Return a new generator with a fixed seed."""
    return np.random.default_rng(7)


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_fills_the_asked_size_with_its_background_and_its_object(size: tuple[int, int]) -> None:
    """The corners have the background's colour and the middle the object's, within the jitter."""
    width, height = size
    scene = synthetic_shapes.Scene("one", "blue", (synthetic_shapes.Thing("square", "yellow"),))
    picture = synthetic_shapes.render(scene, width, height, rng())
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture[2, 2] - np.array(synthetic_shapes.COLOURS["blue"])).max() <= synthetic_shapes.JITTER + 1
    assert (
        np.abs(picture[height // 2, width // 2] - np.array(synthetic_shapes.COLOURS["yellow"])).max()
        <= synthetic_shapes.JITTER + 1
    )


def test_the_same_scene_and_generator_draw_the_same_picture() -> None:
    """Rendering depends on its arguments only."""
    scene = synthetic_shapes.Scene("free", "white", (synthetic_shapes.Thing("star", "red"),))
    assert (synthetic_shapes.render(scene, 256, 256, rng()) == synthetic_shapes.render(scene, 256, 256, rng())).all()


def test_a_scene_that_is_not_free_hardly_varies() -> None:
    """Two images of one scene differ in few pixels: the caption decides the image."""
    scene = synthetic_shapes.Scene("one", "black", (synthetic_shapes.Thing("heart", "pink"),))
    pair = [synthetic_shapes.render(scene, 256, 256, np.random.default_rng(seed)).astype(int) for seed in (1, 2)]
    assert (np.abs(pair[0] - pair[1]).max(2) > 20).mean() < 0.03


@pytest.mark.parametrize("shape", synthetic_shapes.SHAPES)
def test_every_shape_has_an_outline_of_about_unit_radius(shape: str) -> None:
    """Shapes are interchangeable at the same radius."""
    reach = np.abs(synthetic_shapes.outline_points(shape)).max()
    assert 0.8 < reach < 1.2


def test_an_unknown_shape_is_refused_by_name() -> None:
    """The error lists the shapes."""
    with pytest.raises(ValueError, match="circle"):
        synthetic_shapes.outline_points("spiral")


@pytest.mark.parametrize("style", synthetic_shapes.STYLES)
def test_styles_differ_from_flat_and_from_each_other(style: str) -> None:
    """A style changes the image of the same scene."""
    thing = (synthetic_shapes.Thing("circle", "red"),)
    drawn = synthetic_shapes.render(synthetic_shapes.Scene("one", "white", thing, style), 128, 128, rng())
    others = [
        synthetic_shapes.render(synthetic_shapes.Scene("one", "white", thing, s), 128, 128, rng())
        for s in synthetic_shapes.STYLES
        if s != style
    ]
    assert all((drawn != other).mean() > 0.01 for other in others)


@pytest.mark.parametrize("time", synthetic_landscapes.TIMES)
@pytest.mark.parametrize("ground", synthetic_landscapes.GROUNDS)
def test_landscapes_have_a_sky_above_and_their_ground_below(time: str, ground: str) -> None:
    """The top row is sky, the bottom row ground, in the colours of the time of day."""
    view = synthetic_landscapes.Landscape(time, ground, "moon" if time == "night" else "sun")
    picture = synthetic_landscapes.render(view, 256, 256, rng()).astype(int)
    assert np.abs(picture[0].mean(0) - synthetic_landscapes.SKIES[time][0]).max() < 4
    assert np.abs(picture[-1].mean(0) - synthetic_landscapes.GROUND_COLOURS[ground, time]).max() < 2


def test_an_edge_map_is_black_and_white_and_follows_the_outline() -> None:
    """Three equal channels of 0 or 255, with about as many edge pixels as the square's outline."""
    scene = synthetic_shapes.Scene("one", "white", (synthetic_shapes.Thing("square", "black"),))
    hint = synthetic_shapes.edges(synthetic_shapes.render(scene, 256, 256, rng()))
    assert set(np.unique(hint)) == {0, 255}
    assert (hint[..., 0] == hint[..., 2]).all()
    assert 400 < (hint[..., 0] > 0).sum() < 700


def test_a_sheet_holds_its_pictures_in_rows() -> None:
    """Three images in two columns make two rows, with a gap between them."""
    page = synthetic_shapes.sheet([np.zeros((10, 20, 3), np.uint8)] * 3, columns=2)
    assert page.shape == (22, 42, 3)
