"""The parameter `controls` at our routes and OpenAI's: every way to send a unit, keys, layout, and strangers."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from control_networks import guided_app
from fakes import disc, file_of, until

from stable_diffusion_server.imaging import canny, encode_image, read_record
from stable_diffusion_server.types import ControlImage, ControlKind, ControlMode, Format

pytestmark = pytest.mark.slow
__all__ = ["guided_app"]

CREATE, STYLE, INPAINT = "/create_and_upload_image", "/style_transfer_and_upload_image", "/inpaint_and_upload_image"
PIXELS = disc(128, 128)
FILE = file_of(PIXELS)
TEXT = base64.b64encode(FILE).decode()
HALF = np.zeros((128, 128, 3), np.uint8)
HALF[:, 64:] = 255
ASKED = {"prompt": "a red square", "width": 128, "height": 128}


@pytest.fixture
def app(guided_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app whose SDXL has networks."""
    return guided_app()


def post(app: RunningApp, units: Any, path: str = CREATE, **words: Any) -> httpx.Response:
    return app.client.post(path, json={**ASKED, **words, "controls": units})


def drawn(app: RunningApp, answer: httpx.Response) -> tuple[ControlImage, ...]:
    assert answer.status_code == 200, answer.text
    return app.squares.finished[-1].controls


def test_every_way_to_send_a_unit_is_the_same_request(app: RunningApp) -> None:
    """A list in JSON, its text in a form, files of a form, base64 and a data URL: one picture, one key."""
    unit = {"kind": "canny", "weight": 0.7}
    with_text = [{**unit, "image": TEXT}]
    form = {**ASKED, "controls": json.dumps([{**unit, "image_file": 0}])}
    answers = [
        post(app, with_text),
        post(app, [{**unit, "image": f"data:image/png;base64,{TEXT}"}]),
        app.client.post(CREATE, data={**ASKED, "controls": json.dumps(with_text)}),
        app.client.post(CREATE, data=form, files={"control_file": ("a.png", FILE)}),
        app.client.post(CREATE, data=form, files={"control_file[]": ("a.png", FILE)}),
    ]
    (control,) = drawn(app, answers[-1])
    assert len({answer.json()["key"] for answer in answers}) == 1
    assert [answer.json()["cached"] for answer in answers] == [False, True, True, True, True]
    assert (control.network, control.kind, control.weight) == ("canny-sdxl", ControlKind.CANNY, 0.7)
    assert (control.image.pixels == canny(PIXELS)).all()


def test_a_unit_without_an_image_is_guided_by_the_input_image(app: RunningApp) -> None:
    """As `canny=true` is: the same edges; the network's own weight is the default."""
    words = {"prompt": "a red square", "image_url": f"data:image/png;base64,{TEXT}"}
    (control,) = drawn(app, app.client.post(STYLE, json={**words, "controls": [{"kind": "canny"}]}))
    assert app.squares.finished[-1].control is None
    assert app.client.post(STYLE, json={**words, "canny": True}).status_code == 200
    edges = app.squares.finished[-1].control
    assert edges is not None
    assert (edges.digest, 0.5) == (control.image.digest, control.weight)


def test_two_units_reach_the_model_with_all_that_they_say(app: RunningApp) -> None:
    """Network, steps, mode, mask, ready-made image; the union is told its kind."""
    units = [
        {"model": "promax", "kind": "tile", "image": TEXT, "start": 0.2, "end": 0.8, "mode": "control"},
        {"model": "depth-sdxl", "image": TEXT, "preprocess": "none", "mask": base64.b64encode(file_of(HALF)).decode()},
    ]
    tile, depth = drawn(app, post(app, units))
    assert (tile.network, tile.kind, tile.start, tile.end) == ("promax", ControlKind.TILE, 0.2, 0.8)
    assert (tile.mode, tile.mask, tile.weight) == (ControlMode.CONTROL, None, 1.0)
    assert (depth.kind, depth.revision) == (ControlKind.DEPTH, "de" * 32)
    assert (depth.image.pixels == PIXELS).all()
    assert depth.mask is not None
    assert (depth.mask.pixels == HALF[..., 0]).all()


@pytest.mark.parametrize(("resize", "columns"), [("stretch", (0, 128)), ("crop", (0, 128)), ("pad", (0, 64))])
def test_a_picture_is_brought_to_the_size_of_the_result(app: RunningApp, resize: str, columns: tuple[int, int]) -> None:
    """A wide picture, white on its left half: stretched, its middle cut out, or bands above and below it."""
    wide = np.zeros((128, 256, 3), np.uint8)
    wide[:, :128] = 255
    unit = {"kind": "tile", "preprocess": "none", "resize": resize, "image": base64.b64encode(file_of(wide)).decode()}
    (control,) = drawn(app, post(app, [unit]))
    assert control.image.pixels.shape == (128, 128, 3)
    assert control.image.pixels[64, :56].min() > 250
    assert control.image.pixels[64, 72:].max() < 5
    if resize == "pad":  # 128 × 64 in the middle; the rows above repeat its first one
        assert (control.image.pixels[:32] == control.image.pixels[32]).all()


def test_a_unit_follows_the_drawn_part_of_an_inpainted_picture(app: RunningApp) -> None:
    """Its own picture lies over the whole one; `inpaint` without a mask has the request's."""
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[32:96, 32:96] = 255
    words = {"prompt": "a red square", "image_url": f"data:image/png;base64,{TEXT}"}
    words["mask_url"] = "data:image/png;base64," + base64.b64encode(file_of(mask)).decode()
    units = [{"kind": "inpaint"}, {"kind": "canny", "image": TEXT}]
    inpaint, edges = drawn(app, app.client.post(INPAINT, json={**words, "controls": units}))
    assert inpaint.mask is not None
    assert (inpaint.mask.pixels == mask[..., 0]).all()
    assert (inpaint.image.pixels == PIXELS).all()
    assert edges.mask is None
    assert (edges.image.pixels == canny(PIXELS)).all()


def test_all_that_decides_the_picture_is_in_the_key(app: RunningApp) -> None:
    """Each change is another picture; leaving a default out is the same one; none is drawn without its units."""
    usual = {"kind": "canny", "image": TEXT}
    changed = [
        {**usual, "weight": 0.6},
        {**usual, "start": 0.1},
        {**usual, "end": 0.9},
        {**usual, "mode": "prompt"},
        {**usual, "resize": "pad"},
        {**usual, "options": {"low": 50}},
        {**usual, "resolution": 64},
        {**usual, "preprocess": "none"},
        {**usual, "model": "promax"},
        {**usual, "mask": TEXT},
        {**usual, "image": base64.b64encode(file_of(disc(128, 128, "green"))).decode()},
    ]
    same = [{**usual, "weight": 0.5, "preprocess": "canny", "options": {"high": 200}, "model": "canny-sdxl"}]
    keys = [post(app, [unit]).json()["key"] for unit in (usual, *changed)]
    assert len(set(keys)) == len(keys)
    assert post(app, same).json()["key"] == keys[0]
    assert app.client.post(CREATE, json=ASKED).json()["key"] not in keys


def test_a_job_keeps_its_units(app: RunningApp) -> None:
    """A unit in a stored job is drawn as it was sent."""
    body = {**ASKED, "controls": [{"kind": "canny", "image": TEXT, "options": {"low": 60}, "mode": "prompt"}]}
    answer = app.client.post(CREATE, json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    until(lambda: app.client.get(answer.headers["location"]).json()["state"] == "done")
    (control,) = app.squares.finished[-1].controls
    assert control.mode is ControlMode.PROMPT
    assert (control.image.pixels == canny(PIXELS, 60)).all()


def test_openai_takes_units_as_a_further_parameter(app: RunningApp) -> None:
    """In JSON for generations, as a text and files of a form for edits."""
    unit = {"kind": "canny", "image": TEXT}
    body = {"prompt": "a red square", "size": "128x128", "controls": [unit]}
    (control,) = drawn(app, app.client.post("/v1/images/generations", json=body))
    assert (control.image.pixels == canny(PIXELS)).all()
    form = {"prompt": "a red square", "controls": json.dumps([{"kind": "tile", "preprocess": "none", "image_file": 0}])}
    files = [("image", ("a.png", FILE)), ("control_file", ("b.png", file_of(HALF)))]
    (control,) = drawn(app, app.client.post("/v1/images/edits", data=form, files=files))
    assert (control.image.pixels == HALF).all()


UNIT = {"kind": "canny", "image": TEXT}
NOT_TAKEN: tuple[tuple[str, Any, set[str]], ...] = (
    ("an unknown kind", [{"kind": "smell", "image": TEXT}], {"controls[0].kind"}),
    ("an unknown network", [{"model": "none-such", "image": TEXT}], {"controls[0].model"}),
    (
        "a kind without a network",
        [{"kind": "depth", "image": TEXT}, {"kind": "normal", "image": TEXT}],
        {"controls[1].kind"},
    ),
    ("neither kind nor model", [{"image": TEXT}], {"controls[0].kind"}),
    ("a union without a kind", [{"model": "promax", "image": TEXT}], {"controls[0].kind"}),
    (
        "a kind that the union does not know",
        [{"model": "promax", "kind": "depth", "image": TEXT}],
        {"controls[0].kind"},
    ),
    ("no image anywhere", [{"kind": "canny"}], {"controls[0].image"}),
    ("what is repainted", [{"kind": "inpaint", "image": TEXT}], {"controls[0].mask"}),
    ("an unknown preprocessor", [{**UNIT, "preprocess": "magic"}], {"controls[0].preprocess"}),
    ("unknown options", [{**UNIT, "options": {"colour": 1}}], {"controls[0].options"}),
    ("options out of range", [{**UNIT, "options": {"low": -1}}], {"controls[0].options"}),
    (
        "a wrong weight and a wrong end",
        [UNIT, {**UNIT, "weight": 2.1, "end": 1.5}],
        {"controls[1].weight", "controls[1].end"},
    ),
    ("an end before the start", [{**UNIT, "start": 0.5, "end": 0.5}], {"controls[0].end"}),
    ("texts for numbers", [{**UNIT, "weight": "1"}], {"controls[0].weight"}),
    ("true for a number", [{**UNIT, "weight": True}], {"controls[0].weight"}),
    ("a resolution of 63", [{**UNIT, "resolution": 63}], {"controls[0].resolution"}),
    ("an unknown member", [{**UNIT, "colour": 1}], {"controls[0].colour"}),
    ("no list", {"kind": "canny"}, {"controls"}),
    ("no objects", ["canny", 5], {"controls[0]", "controls[1]"}),
    ("a path for an image", [{**UNIT, "image": "/etc/passwd"}], {"controls[0].image"}),
    ("a file's address", [{**UNIT, "image": "file:///etc/passwd"}], {"controls[0].image"}),
    ("a path for a model", [{"model": "../../etc/passwd", "image": TEXT}], {"controls[0].model"}),
    ("base64 that is none", [{**UNIT, "image": "data:image/png;base64,####"}], {"controls[0].image"}),
    (
        "no picture",
        [{**UNIT, "image": f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"}],
        {"controls[0].image"},
    ),
    ("a file that was not sent", [{"kind": "canny", "image_file": 0}], {"controls[0].image_file"}),
    ("two pictures for one unit", [{**UNIT, "image_file": 0}], {"controls[0].image", "controls[0].image_file"}),
    ("more than MAX_CONTROLS", [UNIT] * 5, {"controls[4]"}),
    ("1,000 units", [{"kind": "canny"}] * 1000, {"controls"}),
)


@pytest.mark.parametrize(("units", "fields"), [case[1:] for case in NOT_TAKEN], ids=[case[0] for case in NOT_TAKEN])
def test_what_is_no_unit_is_refused_by_the_name_of_its_field(app: RunningApp, units: Any, fields: set[str]) -> None:
    """Before anything is drawn, with every field at fault."""
    answer = post(app, units)
    assert answer.status_code in (415, 422), answer.text
    assert fields <= {fault["field"] for fault in answer.json()["errors"]}
    assert app.squares.prepared == []
    assert len(answer.content) < 5000


def test_a_model_without_networks_says_so(app: RunningApp) -> None:
    """The error names the parameter."""
    answer = post(app, [UNIT], model="flux")
    assert (answer.status_code, answer.json()["field"]) == (422, "controls")


def test_an_unusual_combination_is_drawn_with_a_warning(app: RunningApp) -> None:
    """Edges for a network of depth, found by the preprocessor of edges."""
    answer = post(app, [{"model": "depth-sdxl", "kind": "canny", "image": TEXT}])
    assert {warning["code"] for warning in answer.json()["warnings"]} == {"unusual-control"}
    assert drawn(app, answer)[0].kind is ControlKind.CANNY


ATTACKS = {
    "10,000 units": "[" + ",".join(['{"kind":"canny"}'] * 10_000) + "]",
    "deep lists": "[" * 20_000 + "]" * 20_000,
    "deep objects": '[{"options":' * 5000 + "1" + "}]" * 5000,
    "a huge number": '[{"kind":"canny","weight":1' + "0" * 400 + "}]",
    "a huge exponent": '[{"kind":"canny","weight":1e400}]',
    "NaN": '[{"kind":"canny","weight":NaN}]',
    "Infinity": '[{"kind":"canny","start":-Infinity}]',
    "a name twice": '[{"kind":"canny","kind":"depth"}]',
    "escapes to another list": '[]},"prompt":[{"a":1}',
    "no JSON": "[{",
    "a lone surrogate": '[{"model":"\\ud800"}]',
    "a null": '["\\u0000"]',
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_texts_are_refused_in_every_encoding(app: RunningApp, name: str) -> None:
    """In a form, in JSON's body and as a text within it: 4xx, and the server goes on."""
    text = ATTACKS[name]
    body = '{"prompt":"a red square","controls":' + text + "}"
    answers = [
        app.client.post(CREATE, data={**ASKED, "controls": text}),
        app.client.post(CREATE, content=body, headers={"content-type": "application/json"}),
        post(app, text),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert len(answer.content) < 5000
    assert app.squares.prepared == []
    assert app.client.post(CREATE, json=ASKED).status_code == 200


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://169.254.169.254/latest", "http://[::1]/a.png"])
def test_a_unit_cannot_reach_the_inner_network(app: RunningApp, url: str) -> None:
    """Image and mask of a unit are fetched as other images are; the error names the unit."""
    for unit in ({"kind": "canny", "image": url}, {"kind": "canny", "image": TEXT, "mask": url}):
        answer = post(app, [UNIT, unit])
        assert 400 <= answer.status_code < 503, answer.text
        assert answer.json()["field"] == f"controls[1].{'mask' if 'mask' in unit else 'image'}"
    assert app.squares.prepared == []


def test_an_image_bomb_in_a_unit_is_refused(guided_app: Callable[..., RunningApp]) -> None:
    """A small file of many pixels, one too many for the settings."""
    app = guided_app(max_image_pixels=1_000_000)
    bomb = base64.b64encode(file_of(np.zeros((1001, 1000, 3), np.uint8))).decode()
    answer = post(app, [{"kind": "canny", "image": bomb}])
    assert (answer.status_code, answer.json()["field"]) == (422, "controls[0].image")


def test_a_guided_picture_is_drawn_again_from_its_files(app: RunningApp) -> None:
    """The record has the units without their images, which are given in their order; other files are refused."""
    units = [{"kind": "canny", "image": TEXT, "mode": "prompt", "options": {"low": 60}}, {"model": "depth-sdxl"}]
    units[1] |= {"image": base64.b64encode(file_of(HALF)).decode(), "mask": TEXT, "preprocess": "none"}
    made = app.client.get(post(app, units, format="png").json()["path"]).content
    record = read_record(made)
    assert record is not None
    assert [unit["network"] for unit in record["controls"]] == ["canny-sdxl", "depth-sdxl"]  # type: ignore[attr-defined]  # a list
    assert TEXT[:40] not in json.dumps(record)

    def replayed(*files: bytes) -> httpx.Response:
        sent = [("picture_file", ("a.png", made)), *(("control_file", ("b.png", file)) for file in files)]
        return app.client.post("/v1/replay", files=sent)

    answer = replayed(FILE, file_of(HALF), FILE)
    assert answer.status_code == 200, answer.text
    assert answer.json()["replay"] == {"same_order": True, "equal": True, "decibels": None}
    assert app.squares.finished[-1].controls == app.squares.finished[-2].controls
    for files in ((), (FILE,), (FILE, FILE, FILE), (FILE, file_of(HALF), FILE, FILE)):
        refused = replayed(*files)
        assert (refused.status_code, refused.json()["field"]) == (422, "control_file")


FORGED: tuple[tuple[Any, set[str]], ...] = (
    ([{"kind": "canny", "image": {"parameter": "x", "url": "http://169.254.169.254/"}}], {"picture_file"}),
    ([{"kind": "canny", "weight": 1e6}], {"controls[0].weight", "control_file"}),
    ([{"kind": "canny", "options": [["low", "x"]]}], {"controls[0].options", "control_file"}),
    ([{"kind": "canny"}] * 1000, {"controls[4]", "control_file"}),
    ([{"kind": "smell"}], {"picture_file"}),
    ("canny", {"picture_file"}),
)


@pytest.mark.parametrize(("units", "fields"), FORGED)
def test_forged_units_are_checked_as_at_any_endpoint(app: RunningApp, units: Any, fields: set[str]) -> None:
    """A record reaches no address, file or number that a parameter could not."""
    made = app.client.get(app.client.post(CREATE, json={**ASKED, "format": "png"}).json()["path"]).content
    record = read_record(made) or {}
    asked = {**record["asked"], "task": "image_to_image", "controls": units}  # type: ignore[dict-item]  # a mapping
    sources = {"image": hashlib.sha256(FILE).hexdigest()}
    forged = encode_image(disc(), Format.PNG, 100, {**record, "asked": asked, "sources": sources})
    before = len(app.squares.finished)
    files = {"picture_file": ("a.png", forged), "image_file": ("b.png", FILE)}
    answer = app.client.post("/v1/replay", files=files)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] in fields
    assert len(app.squares.finished) == before


def test_units_guide_the_second_pass_too(app: RunningApp) -> None:
    """As in AUTOMATIC1111: the control image of the first pass in the size of the second one."""
    unit = {"kind": "canny", "image": TEXT, "end": 0.5}
    answer = post(app, [unit], hires_width=256, hires_height=192, hires_strength=0.5)
    (control,) = drawn(app, answer)
    (first,) = app.squares.finished[-2].controls
    assert (first.image.pixels.shape, control.image.pixels.shape) == ((128, 128, 3), (192, 256, 3))
    assert (control.network, control.weight, control.end) == (first.network, first.weight, 0.5)
