"""The renderer: what a scene says is what its picture shows, at every size."""

import numpy as np
import pytest

from training import landscape, world

pytestmark = pytest.mark.slow

SIZES = [(128, 128), (256, 256), (384, 256), (256, 384), (512, 320)]


def rng() -> np.random.Generator:
    """Return a fresh generator that draws the same numbers every time."""
    return np.random.default_rng(7)


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_fills_the_asked_size_with_its_background_and_its_object(size: tuple[int, int]) -> None:
    """The corners carry the background's colour and the middle the object's, within the jitter."""
    width, height = size
    scene = world.Scene("one", "blue", (world.Thing("square", "yellow"),))
    picture = world.render(scene, width, height, rng())
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    assert np.abs(picture[2, 2] - np.array(world.COLOURS["blue"])).max() <= world.JITTER + 1
    assert np.abs(picture[height // 2, width // 2] - np.array(world.COLOURS["yellow"])).max() <= world.JITTER + 1


def test_the_same_scene_and_generator_draw_the_same_picture() -> None:
    """Rendering depends on nothing but its arguments."""
    scene = world.Scene("free", "white", (world.Thing("star", "red"),))
    assert (world.render(scene, 256, 256, rng()) == world.render(scene, 256, 256, rng())).all()


def test_a_scene_that_is_not_free_hardly_varies() -> None:
    """Two pictures of one scene differ in few pixels: the caption decides the picture."""
    scene = world.Scene("one", "black", (world.Thing("heart", "pink"),))
    pair = [world.render(scene, 256, 256, np.random.default_rng(seed)).astype(int) for seed in (1, 2)]
    assert (np.abs(pair[0] - pair[1]).max(2) > 20).mean() < 0.03


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_has_an_outline_of_about_unit_radius(shape: str) -> None:
    """Shapes can stand for one another at the same radius."""
    reach = np.abs(world.outline_points(shape)).max()
    assert 0.8 < reach < 1.2


def test_an_unknown_shape_is_refused_by_name() -> None:
    """The error says which shapes there are."""
    with pytest.raises(ValueError, match="circle"):
        world.outline_points("spiral")


@pytest.mark.parametrize("style", world.STYLES)
def test_styles_differ_from_flat_and_from_each_other(style: str) -> None:
    """A style changes the picture of the same scene."""
    thing = (world.Thing("circle", "red"),)
    drawn = world.render(world.Scene("one", "white", thing, style), 128, 128, rng())
    others = [world.render(world.Scene("one", "white", thing, s), 128, 128, rng()) for s in world.STYLES if s != style]
    assert all((drawn != other).mean() > 0.01 for other in others)


@pytest.mark.parametrize("time", landscape.TIMES)
@pytest.mark.parametrize("ground", landscape.GROUNDS)
def test_landscapes_have_a_sky_above_and_their_ground_below(time: str, ground: str) -> None:
    """The uppermost row is sky, the lowest the ground, in the colours of the time of day."""
    view = landscape.Landscape(time, ground, "moon" if time == "night" else "sun")
    picture = landscape.render(view, 256, 256, rng()).astype(int)
    assert np.abs(picture[0].mean(0) - landscape.SKIES[time][0]).max() < 4
    assert np.abs(picture[-1].mean(0) - landscape.GROUND_COLOURS[ground, time]).max() < 2


def test_an_edge_map_is_black_and_white_and_follows_the_outline() -> None:
    """Three equal channels of 0 or 255, with about as many edge pixels as the square has rim."""
    scene = world.Scene("one", "white", (world.Thing("square", "black"),))
    hint = world.edges(world.render(scene, 256, 256, rng()))
    assert set(np.unique(hint)) == {0, 255}
    assert (hint[..., 0] == hint[..., 2]).all()
    assert 400 < (hint[..., 0] > 0).sum() < 700


def test_a_sheet_holds_its_pictures_in_rows() -> None:
    """Three pictures in two columns make two rows, with a gap between them."""
    page = world.sheet([np.zeros((10, 20, 3), np.uint8)] * 3, columns=2)
    assert page.shape == (22, 42, 3)
