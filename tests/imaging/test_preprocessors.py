"""Preprocessors without models: what they make of known pictures, their options, names and bounds."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import InProcessPreprocessor
from stable_diffusion_server.imaging import (
    PREPROCESSORS,
    Pixels,
    Preprocessor,
    canny,
    control_size,
    draw_control,
    find_preprocessor,
    preprocessors_of,
)
from stable_diffusion_server.imaging.control_images.line_maps import thin_lines

IN_PROCESS = [row for row in PREPROCESSORS.values() if row.draw is not None]
# AUTOMATIC1111's modules without a model, and some with one, that clients send.
KNOWN_NAMES = (
    "canny", "invert (from white bg & black line)", "lineart_standard (from white bg & black line)", "scribble_xdog",
    "tile_resample", "blur_gaussian", "recolor_luminance", "recolor_intensity", "shuffle", "threshold",
    "depth_anything_v2", "depth_midas", "dw_openpose_full", "openpose_full", "softedge_pidinet", "softedge_hed",
    "lineart_realistic", "lineart_anime", "scribble_pidinet", "normal_bae", "normal_midas", "t2ia_color_grid",
)  # fmt: skip


def drawn(name: str, pixels: Pixels, **options: float) -> Pixels:
    row = find_preprocessor(name, "preprocess")
    return draw_control(row, pixels, row.values(options, "preprocess"), "preprocess")


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)


def drawing() -> Pixels:
    """Black strokes on white paper, 96 × 128."""
    paper = np.full((96, 128, 3), 255, np.uint8)
    cv2.line(paper, (10, 48), (118, 48), (0, 0, 0), 2)
    cv2.circle(paper, (64, 48), 30, (0, 0, 0), 2)
    return paper


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_automatic1111_names_are_known(name: str) -> None:
    """In any case and with spaces around; each name means one preprocessor."""
    assert find_preprocessor(f" {name.upper()} ", "module") is find_preprocessor(name, "module")
    names = [name for row in PREPROCESSORS.values() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", IN_PROCESS, ids=lambda row: row.name)
@settings(max_examples=8, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_every_size_gives_a_picture_and_leaves_the_input_alone(row: Preprocessor, height: int, width: int) -> None:
    """Also one pixel, also views with gaps; the size stays unless the preprocessor is to make it smaller."""
    name = row.name
    wide = noise(height, 2 * width)
    view = wide[:, ::2]
    before = wide.copy()
    made = drawn(name, view)
    assert (made.shape, made.dtype) == ((height, width, 3), np.uint8)
    assert (wide == before).all()
    assert (drawn(name, view) == made).all()


def test_lines_are_white_on_black() -> None:
    """All line preprocessors find strokes of a drawing, and nothing on paper far from them."""
    paper = drawing()
    strokes = paper[..., 0] == 0
    for name in ("lineart_standard", "scribble_threshold", "scribble_xdog", "invert", "softedge_gradient"):
        found = drawn(name, paper)
        assert found[strokes].mean() > 100, name
        assert found[2:10, 2:10].max() == 0, name
    assert (drawn("threshold", paper) == paper).all()
    assert (drawn("scribble", paper) == drawn("invert", paper)).all()


def test_thresholds_decide() -> None:
    """A grey line is a stroke only for a threshold above it; canny is the server's own."""
    paper = np.full((64, 64, 3), 255, np.uint8)
    paper[30:33] = 150
    assert drawn("scribble", paper, threshold=140).max() == 0
    assert drawn("scribble", paper, threshold=160).max() == 255
    picture = noise(64, 64)
    assert (drawn("canny", picture, low=50, high=70) == canny(picture, 50, 70)).all()
    few, many = drawn("scribble_xdog", picture, threshold=64), drawn("scribble_xdog", picture, threshold=1)
    assert few.mean() < many.mean()


def test_an_even_picture_has_no_edges_and_noise_is_not_stretched() -> None:
    """Faint gradients stay faint, so a grey wall does not become a white control image."""
    wall = np.full((80, 80, 3), 120, np.uint8)
    faint = wall + np.random.default_rng(1).integers(0, 3, wall.shape, np.uint8)
    for name in ("canny", "lineart", "softedge_gradient", "scribble_xdog"):
        assert drawn(name, wall).max() == 0
        assert drawn(name, faint).max() < 40


def test_tones_are_what_their_names_say() -> None:
    """Grey by lightness and by the largest channel with gamma, cells of one colour, tiles by area, blur by Gaussian."""
    picture = noise(192, 128)
    lightness = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)[..., 0]
    assert np.abs(drawn("gray", picture)[..., 1].astype(int) - lightness).max() <= 1
    assert np.abs(drawn("recolor_intensity", picture)[..., 0].astype(int) - picture.max(axis=2)).max() <= 1
    assert (
        drawn("gray", picture, gamma=2).mean()
        < drawn("gray", picture).mean()
        < drawn("gray", picture, gamma=0.5).mean()
    )
    cells = drawn("color_grid", picture)
    assert len(np.unique(cells.reshape(-1, 3), axis=0)) == 6
    assert np.abs(cells[0, 0] - picture[:64, :64].mean(axis=(0, 1))).max() < 1
    assert (drawn("tile", picture) == picture).all()
    halved = drawn("tile", picture, down_sampling_rate=2)
    assert halved.shape == (96, 64, 3)
    assert np.abs(halved - picture.reshape(96, 2, 64, 2, 3).mean(axis=(1, 3))).max() <= 0.5
    sharp = cv2.GaussianBlur(picture, (0, 0), 3.0)
    assert (drawn("blur_gaussian", picture, sigma=3) == sharp).all()


def test_a_wide_blur_equals_the_gaussian() -> None:
    """It is made from a smaller image: within 2 of 255 of the filter itself, and linear in time."""
    picture = cv2.resize(noise(12, 12), (384, 320), interpolation=cv2.INTER_CUBIC)
    for sigma in (9.0, 20.0, 40.0):
        exact = cv2.GaussianBlur(picture, (0, 0), sigma).astype(int)
        assert np.abs(drawn("blur", picture, sigma=sigma) - exact)[64:-64, 64:-64].max() <= 2


def test_shuffled_content_keeps_its_colours() -> None:
    """The same seed bends alike, another one otherwise; no new colours of a picture of two appear but mixtures."""
    picture = np.zeros((256, 300, 3), np.uint8)
    picture[:, 150:] = (200, 10, 60)
    first = drawn("shuffle", picture)
    assert (first == drawn("shuffle", picture, seed=0)).all()
    assert (first != drawn("shuffle", picture, seed=1)).any()
    assert {tuple(colour) for colour in first[[0, 60, 120], [10, 100, 200]]} <= {(0, 0, 0), (200, 10, 60)}


def test_ridges_become_broad_lines() -> None:
    """Soft edges as drawn lines: 0 and 255 only, around the ridge."""
    soft = np.zeros((64, 64), np.uint8)
    soft[:, 28:36] = 255
    lines = thin_lines(cv2.GaussianBlur(soft, (0, 0), 2.0))
    assert set(np.unique(lines)) == {0, 255}
    assert lines[32, 32] == 255
    assert lines[:, :16].max() == 0


def test_the_shorter_side_becomes_the_resolution() -> None:
    """Up and down, with the aspect ratio kept; preprocessors that change single pixels have none."""
    picture = noise(100, 150)
    assert drawn("canny", picture, resolution=64).shape == (64, 96, 3)
    assert drawn("canny", picture, resolution=200).shape == (200, 300, 3)
    with pytest.raises(InvalidInput, match="no option 'resolution'"):
        drawn("invert", picture, resolution=64)


def test_a_thin_picture_is_not_enlarged_without_bounds() -> None:
    """A line of 16,383 pixels at a resolution of 2048 would have 687 GB."""
    with pytest.raises(InvalidInput, match="smaller resolution") as caught:
        control_size(16_383, 1, 2048, "preprocess")
    assert caught.value.field == "preprocess"
    assert control_size(640, 480, 0, "preprocess") == (640, 480)


BAD: list[tuple[str, dict[str, float], list[str]]] = [
    ("canny", {"low": -1}, ["low of canny must be 0 to 2040"]),
    ("canny", {"low": 200, "high": 100}, ["low of canny must not be above high"]),
    ("canny", {"low": math.nan, "high": math.inf}, ["low of canny", "high of canny"]),
    ("canny", {"resolution": 63}, ["resolution of canny must be 0, or 64 to 2048"]),
    ("canny", {"x" * 500: 1.0, "sigma": 2}, ["no option 'xxx", "no option 'sigma'"]),
    ("blur", {"sigma": 0}, ["sigma of blur_gaussian must be 0.01 to 64"]),
    ("tile", {"down_sampling_rate": 1e300}, ["down_sampling_rate"]),
]


@pytest.mark.parametrize(("name", "options", "sentences"), BAD)
def test_bad_options_are_refused_all_at_once(name: str, options: Mapping[str, float], sentences: list[str]) -> None:
    """Each fault has its sentence; a long name is cut."""
    with pytest.raises(InvalidInput) as caught:
        find_preprocessor(name, "controls").values(options, "controls")
    assert all(sentence in caught.value.detail for sentence in sentences)
    assert len(caught.value.detail) < 400


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    """One sentence that names the field's alternatives."""
    with pytest.raises(InvalidInput, match="none, canny, lineart_standard"):
        find_preprocessor("y" * 10_000, "controls")


def test_kinds_list_what_fits_them() -> None:
    """Those made for the kind come first; every kind of the table has one."""
    assert [row.name for row in preprocessors_of("canny")] == ["canny", "invert"]
    assert preprocessors_of("tile")[0].name == "tile_resample"
    assert preprocessors_of("nothing") == ()
    kinds = {row.kind for row in PREPROCESSORS.values()}
    assert kinds >= {"canny", "lineart", "softedge", "scribble", "depth", "normal", "openpose", "tile", "blur", "gray"}


@pytest.mark.parametrize("row", IN_PROCESS, ids=lambda row: row.name)
def test_memory_is_a_few_copies_of_the_picture(row: Preprocessor) -> None:
    """At most 12 bytes of numpy's per byte of the picture, so the largest one allowed stays far below a gigabyte."""
    name = row.name
    picture = noise(512, 512)
    tracemalloc.start()
    drawn(name, picture)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * picture.nbytes


def test_the_page_lists_every_preprocessor() -> None:
    """docs/controls.md names each in the first column of a table, and all of its further names."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "controls.md").read_text()
    for row in PREPROCESSORS.values():
        assert f"\n| `{row.name}` | {', '.join(row.kinds)} |" in page
        assert all(f"`{alias}`" in page for alias in row.aliases)
        assert all(f"`{option.name}` {option.low:g} to" in page for option in row.options)


async def test_the_front_door_chooses_checks_and_draws() -> None:
    """`none` gives the picture itself; identities tell options apart; what needs a model is refused by name."""
    door, picture = InProcessPreprocessor(), noise(64, 64)
    ready = door.find("None", {}, "controls")
    assert (ready.name, ready.identity) == ("none", "")
    assert (await door.preprocess(ready, picture, "controls")) is picture
    edges = door.find("canny", {"low": 10, "high": 20}, "controls")
    assert (await door.preprocess(edges, picture, "controls") == canny(picture, 10, 20)).all()
    assert edges.identity != door.find("canny", {}, "controls").identity
    assert door.find("canny", {"low": 100}, "controls").identity == door.find("canny", {}, "controls").identity
    with pytest.raises(InvalidInput, match="needs Depth-Anything V2"):
        door.find("depth_anything_v2", {}, "controls")
    with pytest.raises(InvalidInput, match="takes no options"):
        door.find("none", {"low": 3}, "controls")
    assert {row.name for row in door.usable()} == {row.name for row in IN_PROCESS}
