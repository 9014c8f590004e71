"""The image checker: it reads rendered images correctly, and detects what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from training import captions, image_checker, synthetic_landscapes, synthetic_shapes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["one", "two", "many", "placed"])
def test_the_checker_reads_rendered_flat_scenes_at_least_99_times_of_100(kind: str) -> None:
    """Its own accuracy on correct images, on which every number in the model card depends."""
    rng = np.random.default_rng(5)
    right = 0
    for _ in range(100):
        scene = captions.draw_scene(rng, kind, "flat")
        right += image_checker.check_scene(synthetic_shapes.render(scene, 256, 256, rng), scene)["all"]
    assert right >= 99


@pytest.mark.parametrize("size", [(128, 128), (384, 256), (256, 384)])
def test_the_checker_reads_other_sizes_as_well(size: tuple[int, int]) -> None:
    """It reads two objects and their relation at every trained size."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        scene = captions.draw_scene(rng, "two", "flat")
        assert image_checker.check_scene(synthetic_shapes.render(scene, *size, rng), scene)["all"]


def test_the_checker_notices_each_wrong_fact() -> None:
    """An image with another colour, shape, count, place or background is detected and the fact named."""
    asked = synthetic_shapes.Scene(
        "placed", "white", (synthetic_shapes.Thing("circle", "red", 1, "small"),), position="top left"
    )
    wrong = {
        "background": replace(asked, background="cyan"),
        "colour": replace(asked, things=(synthetic_shapes.Thing("circle", "blue", 1, "small"),)),
        "shape": replace(asked, things=(synthetic_shapes.Thing("star", "red", 1, "small"),)),
        "place": replace(asked, position="bottom right"),
        "count": replace(asked, kind="many", things=(synthetic_shapes.Thing("circle", "red", 3),)),
    }
    for fact, drawn in wrong.items():
        verdict = image_checker.check_scene(synthetic_shapes.render(drawn, 256, 256, np.random.default_rng(0)), asked)
        assert not verdict[fact]
        assert not verdict["all"]


def test_swapped_colours_of_two_objects_are_noticed() -> None:
    """Both colours and both shapes are present, but bound wrongly."""
    asked = synthetic_shapes.Scene(
        "two",
        "white",
        (synthetic_shapes.Thing("square", "red"), synthetic_shapes.Thing("circle", "blue")),
        relation="above",
    )
    swapped = replace(asked, things=(synthetic_shapes.Thing("square", "blue"), synthetic_shapes.Thing("circle", "red")))
    verdict = image_checker.check_scene(synthetic_shapes.render(swapped, 256, 256, np.random.default_rng(0)), asked)
    assert verdict["colour"]
    assert verdict["shape"]
    assert not verdict["both"]


def test_an_empty_picture_has_no_object() -> None:
    """It finds no object in an empty image, and raises nothing."""
    scene = synthetic_shapes.Scene("one", "white", (synthetic_shapes.Thing("circle", "red"),))
    verdict = image_checker.check_scene(np.full((256, 256, 3), 245, np.uint8), scene)
    assert verdict["background"]
    assert not verdict["shape"]


def test_landscapes_are_distinguished_fact_by_fact() -> None:
    """A correct landscape passes; one at another time of day or without its house does not."""
    view = synthetic_landscapes.Landscape("sunset", "hill", "sun", house="red", tree=True)
    rng = np.random.default_rng(0)
    assert image_checker.check_landscape(synthetic_landscapes.render(view, 256, 256, rng), view)["all"]
    day = synthetic_landscapes.render(replace(view, time="day"), 256, 256, rng)
    assert not image_checker.check_landscape(day, view)["time"]
    bare = synthetic_landscapes.render(replace(view, house=""), 256, 256, rng)
    assert not image_checker.check_landscape(bare, view)["house"]
