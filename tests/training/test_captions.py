"""The caption grammar: random scenes can be rendered, and their captions state every fact that decides the image."""

import numpy as np
import pytest

from training import captions, synthetic_shapes
from training.synthetic_landscapes import Landscape

pytestmark = pytest.mark.slow


def test_no_object_stands_on_its_own_colour() -> None:
    """Every object differs enough from the background to be visible."""
    rng = np.random.default_rng(0)
    for kind in ("one", "two", "many", "placed", "free"):
        for _ in range(100):
            scene = captions.draw_scene(rng, kind)
            assert all(synthetic_shapes.far(thing.colour, scene.background) for thing in scene.things)


def test_kinds_come_as_often_as_their_shares_say() -> None:
    """The shares sum to one, and a thousand scenes match them within four percent."""
    rng = np.random.default_rng(1)
    scenes = [captions.draw_scene(rng) for _ in range(1000)]
    assert sum(captions.KIND_SHARES.values()) == pytest.approx(1)
    found = sum(isinstance(scene, Landscape) for scene in scenes) / 1000
    assert found == pytest.approx(captions.KIND_SHARES["landscape"], abs=0.04)


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        (
            synthetic_shapes.Scene("one", "blue", (synthetic_shapes.Thing("circle", "red"),)),
            "a red circle on a blue background",
        ),
        (
            synthetic_shapes.Scene(
                "placed", "black", (synthetic_shapes.Thing("star", "yellow", 1, "small"),), position="top left"
            ),
            "a small yellow star in the top left corner on a black background",
        ),
        (
            synthetic_shapes.Scene(
                "two",
                "white",
                (synthetic_shapes.Thing("square", "red"), synthetic_shapes.Thing("circle", "blue")),
                relation="above",
            ),
            "a red square above a blue circle on a white background",
        ),
        (
            synthetic_shapes.Scene("many", "orange", (synthetic_shapes.Thing("cross", "green", 3),)),
            "three green crosses on an orange background",
        ),
        (
            Landscape("night", "hill", "moon", house="red", tree=True),
            "a red house and a tree on a hill at night",
        ),
    ],
)
def test_plain_captions_read_like_a_person_wrote_them(scene: synthetic_shapes.Scene | Landscape, said: str) -> None:
    """Without paraphrasing a scene has one caption."""
    assert captions.say_scene(scene, np.random.default_rng(0), 0.0) == said


def test_paraphrases_vary_and_stay_lower_case() -> None:
    """Fifty paraphrases of one scene give many captions, none with a capital."""
    rng = np.random.default_rng(2)
    scene = synthetic_shapes.Scene(
        "two",
        "gray",
        (synthetic_shapes.Thing("heart", "red"), synthetic_shapes.Thing("star", "purple")),
        relation="below",
    )
    said = {captions.say_scene(scene, rng, 0.5) for _ in range(50)}
    assert len(said) > 40
    assert all(caption == caption.lower() for caption in said)


def test_a_missing_background_means_white_or_black_where_white_would_not_show() -> None:
    """A caption may omit the background only where it is the default."""
    assert captions.usual_background([synthetic_shapes.Thing("circle", "red")]) == "white"
    assert captions.usual_background([synthetic_shapes.Thing("circle", "white")]) == "black"


def test_restyled_captions_keep_their_words() -> None:
    """Capitals and punctuation change, the words do not."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        typed = captions.restyled("a red circle", rng)
        assert typed != "a red circle"
        assert typed.lower().rstrip(" .!") == "a red circle"
