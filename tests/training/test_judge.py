"""The judge: it reads rendered pictures rightly, and it notices what is wrong."""

from dataclasses import replace

import numpy as np
import pytest

from training import grammar, judge, landscape, world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["one", "two", "many", "placed"])
def test_the_judge_reads_rendered_flat_scenes_at_least_99_times_of_100(kind: str) -> None:
    """Its own accuracy on true pictures, of which every figure in the model card is made."""
    rng = np.random.default_rng(5)
    right = 0
    for _ in range(100):
        scene = grammar.draw_scene(rng, kind, "flat")
        right += judge.judge_scene(world.render(scene, 256, 256, rng), scene)["all"]
    assert right >= 99


@pytest.mark.parametrize("size", [(128, 128), (384, 256), (256, 384)])
def test_the_judge_reads_other_sizes_as_well(size: tuple[int, int]) -> None:
    """Two objects and their relation are read at every trained size."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        scene = grammar.draw_scene(rng, "two", "flat")
        assert judge.judge_scene(world.render(scene, *size, rng), scene)["all"]


def test_the_judge_notices_each_wrong_fact() -> None:
    """A picture of another colour, shape, count, place or background is caught and named."""
    asked = world.Scene("placed", "white", (world.Thing("circle", "red", 1, "small"),), position="top left")
    wrong = {
        "background": replace(asked, background="cyan"),
        "colour": replace(asked, things=(world.Thing("circle", "blue", 1, "small"),)),
        "shape": replace(asked, things=(world.Thing("star", "red", 1, "small"),)),
        "place": replace(asked, position="bottom right"),
        "count": replace(asked, kind="many", things=(world.Thing("circle", "red", 3),)),
    }
    for fact, drawn in wrong.items():
        verdict = judge.judge_scene(world.render(drawn, 256, 256, np.random.default_rng(0)), asked)
        assert not verdict[fact]
        assert not verdict["all"]


def test_swapped_colours_of_two_objects_are_noticed() -> None:
    """Both colours and both shapes are there, but bound wrongly."""
    asked = world.Scene("two", "white", (world.Thing("square", "red"), world.Thing("circle", "blue")), relation="above")
    swapped = replace(asked, things=(world.Thing("square", "blue"), world.Thing("circle", "red")))
    verdict = judge.judge_scene(world.render(swapped, 256, 256, np.random.default_rng(0)), asked)
    assert verdict["colour"]
    assert verdict["shape"]
    assert not verdict["both"]


def test_an_empty_picture_has_no_object() -> None:
    """Nothing is found where nothing is drawn, and nothing raises."""
    scene = world.Scene("one", "white", (world.Thing("circle", "red"),))
    verdict = judge.judge_scene(np.full((256, 256, 3), 245, np.uint8), scene)
    assert verdict["background"]
    assert not verdict["shape"]


def test_landscapes_are_told_apart_fact_by_fact() -> None:
    """A true landscape passes; one at another time or without its house does not."""
    view = landscape.Landscape("sunset", "hill", "sun", house="red", tree=True)
    rng = np.random.default_rng(0)
    assert judge.judge_landscape(landscape.render(view, 256, 256, rng), view)["all"]
    day = landscape.render(replace(view, time="day"), 256, 256, rng)
    assert not judge.judge_landscape(day, view)["time"]
    bare = landscape.render(replace(view, house=""), 256, 256, rng)
    assert not judge.judge_landscape(bare, view)["house"]
