"""The parameter `image_prompts` in every dialect: every way to send one, keys, jobs, records, and strangers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import disc, file_of, until
from image_prompt_adapters import prompted_app

from stable_diffusion_server.imaging import read_record
from stable_diffusion_server.types import PromptImage

pytestmark = pytest.mark.slow
__all__ = ["prompted_app"]

CREATE, STYLE = "/create_and_upload_image", "/style_transfer_and_upload_image"
PIXELS = disc(96, 64)
FILE = file_of(PIXELS)
TEXT = base64.b64encode(FILE).decode()
OTHER = base64.b64encode(file_of(disc(64, 64, "green"))).decode()
ASKED = {"prompt": "a red square", "width": 128, "height": 128}
USUAL = {"image": TEXT}
FIRST, FACE = "ip-adapter_sdxl", "ip-adapter-plus-face_sdxl"


@pytest.fixture
def app(prompted_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app whose SDXL has adapters."""
    return prompted_app()


def post(app: RunningApp, prompts: Any, **words: Any) -> httpx.Response:
    return app.client.post(CREATE, json={**ASKED, **words, "image_prompts": prompts})


def drawn(app: RunningApp, answer: httpx.Response) -> tuple[PromptImage, ...]:
    assert answer.status_code == 200, answer.text
    return app.squares.finished[-1].image_prompts


def test_every_way_to_send_one_is_the_same_request(app: RunningApp) -> None:
    """A list in JSON, its text in a form, files of a form, base64 and a data URL: one picture, one key."""
    form = {**ASKED, "image_prompts": json.dumps([{"image_file": 0, "weight": 0.7}])}
    usual = {**USUAL, "weight": 0.7}
    answers = [
        post(app, [usual]),
        post(app, [{**usual, "image": f"data:image/png;base64,{TEXT}"}]),
        app.client.post(CREATE, data={**ASKED, "image_prompts": json.dumps([usual])}),
        app.client.post(CREATE, data=form, files={"image_prompt_file": ("a.png", FILE)}),
        app.client.post(CREATE, data=form, files={"image_prompt_file[]": ("a.png", FILE)}),
        post(app, [{**usual, "model": FIRST, "start": 0, "end": 1}]),
    ]
    (prompt,) = drawn(app, answers[0])
    assert len({answer.json()["key"] for answer in answers}) == 1
    assert [answer.json()["cached"] for answer in answers] == [False, *[True] * 5]
    assert (prompt.name, prompt.revision, prompt.weight) == (FIRST, "10" * 32, 0.7)
    assert (prompt.image.pixels == PIXELS).all()


def test_all_that_decides_the_picture_is_in_the_key(app: RunningApp) -> None:
    """Image, adapter, weight, range, number and order; requests without image prompts keep their key."""
    changed: list[list[dict[str, Any]]] = [
        [USUAL],
        [{**USUAL, "weight": 0.6}],
        [{**USUAL, "start": 0.1}],
        [{**USUAL, "end": 0.9}],
        [{**USUAL, "model": FACE}],
        [{"image": OTHER}],
        [USUAL, {"image": OTHER}],
        [{"image": OTHER}, USUAL],
        [USUAL, USUAL],
    ]
    keys = [post(app, prompts).json()["key"] for prompts in changed]
    assert len(set(keys)) == len(keys)
    assert app.client.post(CREATE, json=ASKED).json()["key"] not in keys


def test_they_reach_image_to_image_and_openai(app: RunningApp) -> None:
    """With files of a form, as a further parameter of OpenAI's routes, beside an input image."""
    words = {"prompt": "a red square", "image_url": f"data:image/png;base64,{TEXT}"}
    both = [{**USUAL, "model": FACE, "end": 0.5}, {"image": OTHER}]
    one, two = drawn(app, app.client.post(STYLE, json={**words, "image_prompts": both}))
    assert (one.name, one.end, two.name, two.image.pixels.shape) == (FACE, 0.5, FIRST, (64, 64, 3))
    body = {"prompt": "a red square", "size": "128x128", "image_prompts": [USUAL]}
    assert len(drawn(app, app.client.post("/v1/images/generations", json=body))) == 1
    form = {"prompt": "a red square", "image_prompts": json.dumps([{"image_file": 0}])}
    files = [("image", ("a.png", FILE)), ("image_prompt_file", ("b.png", FILE))]
    (prompt,) = drawn(app, app.client.post("/v1/images/edits", data=form, files=files))
    assert (prompt.image.pixels == PIXELS).all()


def test_a_large_picture_is_shrunk_before_it_waits(app: RunningApp) -> None:
    """To a million pixels, of its own shape."""
    large = base64.b64encode(file_of(disc(2048, 1024))).decode()
    (prompt,) = drawn(app, post(app, [{"image": large}]))
    height, width = prompt.image.pixels.shape[:2]
    assert height * width <= 1024 * 1024
    assert width / height == pytest.approx(2, rel=0.01)


def test_a_job_keeps_them(app: RunningApp) -> None:
    """One in a stored job is drawn as it was sent."""
    body = {**ASKED, "image_prompts": [{**USUAL, "weight": 0.4, "start": 0.25}]}
    answer = app.client.post(CREATE, json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    until(lambda: app.client.get(answer.headers["location"]).json()["state"] == "done")
    (prompt,) = app.squares.finished[-1].image_prompts
    assert (prompt.weight, prompt.start) == (0.4, 0.25)
    assert (prompt.image.pixels == PIXELS).all()


def test_the_second_pass_attends_to_them_too(app: RunningApp) -> None:
    """As the first one does."""
    second_pass = {"enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    answer = with_units(app, {"module": "ip-adapter-auto", "image": TEXT}, **second_pass)
    assert answer.status_code == 200, answer.text
    first, second = app.squares.finished[-2:]
    assert (second.width, second.image_prompts) == (256, first.image_prompts)


def test_the_record_says_what_read_them(app: RunningApp) -> None:
    """Name, digest, weight, range, and the digest of the image; no image. A replay is refused in a sentence."""
    made = app.client.get(post(app, [{**USUAL, "end": 0.5}], format="png").json()["path"]).content
    record = read_record(made)
    assert record is not None
    (shown,) = record["image_prompts"]  # type: ignore[misc]  # a list
    assert (shown["name"], shown["revision"], shown["weight"], shown["end"]) == (FIRST, "10" * 32, 1.0, 0.5)
    assert TEXT[:40] not in json.dumps(record)
    answer = app.client.post("/v1/replay", files={"picture_file": ("a.png", made)})
    assert (answer.status_code, answer.json()["field"]) == (422, "picture_file")


NOT_TAKEN: tuple[tuple[str, Any, set[str]], ...] = (
    ("an unknown adapter", [USUAL, {**USUAL, "model": "none-such"}], {"image_prompts[1].model"}),
    ("two unknown adapters", [{**USUAL, "model": "a"}] * 2, {"image_prompts[0].model", "image_prompts[1].model"}),
    ("a path for a model", [{**USUAL, "model": "../../etc/passwd"}], {"image_prompts[0].model"}),
    ("no image", [{"weight": 1.0}], {"image_prompts[0].image"}),
    ("two images for one", [{**USUAL, "image_file": 0}], {"image_prompts[0].image"}),
    ("a file that was not sent", [{"image_file": 0}], {"image_prompts[0].image_file"}),
    (
        "a wrong weight and a wrong end",
        [USUAL, {**USUAL, "weight": 2.1, "end": 1.5}],
        {"image_prompts[1].weight", "image_prompts[1].end"},
    ),
    ("an end before the start", [{**USUAL, "start": 0.5, "end": 0.5}], {"image_prompts[0].end"}),
    (
        "a range for what counts at all steps",
        [{**USUAL, "model": "redux", "end": 0.5}, {**USUAL, "model": "redux", "start": 0.5}],
        {"image_prompts[0].end", "image_prompts[1].start"},
    ),
    ("texts for numbers", [{**USUAL, "weight": "1"}], {"image_prompts[0].weight"}),
    ("true for a number", [{**USUAL, "weight": True}], {"image_prompts[0].weight"}),
    ("an unknown member", [{**USUAL, "colour": 1}], {"image_prompts[0].colour"}),
    ("no list", USUAL, {"image_prompts"}),
    ("no objects", ["style", 5], {"image_prompts[0]", "image_prompts[1]"}),
    ("a path for an image", [{"image": "/etc/passwd"}], {"image_prompts[0].image"}),
    ("a file's address", [{"image": "file:///etc/passwd"}], {"image_prompts[0].image"}),
    ("the inner network", [USUAL, {"image": "http://169.254.169.254/latest"}], {"image_prompts[1].image"}),
    (
        "no picture",
        [{"image": f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"}],
        {"image_prompts[0].image"},
    ),
    ("more than MAX_IMAGE_PROMPTS", [USUAL] * 5, {"image_prompts[4]"}),
    ("1,000 image prompts", [{"image": "x"}] * 1000, {"image_prompts"}),
)


@pytest.mark.parametrize(("prompts", "fields"), [case[1:] for case in NOT_TAKEN], ids=[case[0] for case in NOT_TAKEN])
def test_what_is_no_image_prompt_is_refused_by_its_field(app: RunningApp, prompts: Any, fields: set[str]) -> None:
    """Before anything is drawn, with every field at fault."""
    answer = post(app, prompts)
    assert 400 <= answer.status_code < 500, answer.text
    problem = answer.json()
    assert fields <= {fault["field"] for fault in problem.get("errors", [{"field": problem.get("field")}])}
    assert app.squares.prepared == []
    assert len(answer.content) < 5000


def test_a_model_without_adapters_says_so(app: RunningApp) -> None:
    """The error names the parameter."""
    answer = post(app, [USUAL], model="flux")
    assert (answer.status_code, answer.json()["field"]) == (422, "image_prompts")


ATTACKS = {
    "10,000 entries": "[" + ",".join(['{"weight":1}'] * 10_000) + "]",
    "deep lists": "[" * 20_000 + "]" * 20_000,
    "a huge number": '[{"weight":1' + "0" * 400 + "}]",
    "a huge exponent": '[{"weight":1e400}]',
    "NaN": '[{"weight":NaN}]',
    "Infinity": '[{"start":-Infinity}]',
    "a name twice": '[{"weight":1,"weight":2}]',
    "escapes to another list": '[]},"prompt":[{"a":1}',
    "no JSON": "[{",
    "a lone surrogate": '[{"model":"\\ud800"}]',
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_texts_are_refused_in_every_encoding(app: RunningApp, name: str) -> None:
    """In a form, in JSON's body and as a text within it: 4xx, and the server goes on."""
    text = ATTACKS[name]
    body = '{"prompt":"a red square","image_prompts":' + text + "}"
    answers = [
        app.client.post(CREATE, data={**ASKED, "image_prompts": text}),
        app.client.post(CREATE, content=body, headers={"content-type": "application/json"}),
        post(app, text),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert len(answer.content) < 5000
    assert app.squares.prepared == []
    assert app.client.post(CREATE, json=ASKED).status_code == 200


def test_an_image_bomb_is_refused(prompted_app: Callable[..., RunningApp]) -> None:
    """A small file of many pixels, one too many for the settings."""
    app = prompted_app(max_image_pixels=1_000_000)
    bomb = base64.b64encode(file_of(np.zeros((1001, 1000, 3), np.uint8))).decode()
    answer = post(app, [{"image": bomb}])
    assert (answer.status_code, answer.json()["field"]) == (422, "image_prompts[0].image")


def with_units(app: RunningApp, *units: dict[str, Any], path: str = "txt2img", **more: Any) -> httpx.Response:
    body = {**ASKED, "steps": 2, **more, "alwayson_scripts": {"ControlNet": {"args": [*units]}}}
    return app.client.post(f"/sdapi/v1/{path}", json=body)


def test_units_of_ip_adapters_are_image_prompts(app: RunningApp) -> None:
    """By their detector or their model; an unknown model is the first one, with a sentence; FaceID is left out."""
    units = [
        {"module": "ip-adapter-auto", "model": f"{FACE} [1a2b3c4d]", "image": TEXT, "weight": 0.6, "guidance_end": 0.8},
        {"module": "none", "model": "ip-adapter_other", "image": {"image": OTHER}},
        {"module": "ip-adapter_face_id", "model": "ip-adapter-faceid", "image": TEXT},
        {"module": "ip-adapter_clip_sdxl", "image": TEXT, "weight": 5},
    ]
    answer = with_units(app, *units)
    one, two = drawn(app, answer)
    assert (one.name, one.weight, one.end, two.name, two.weight) == (FACE, 0.6, 0.8, FIRST, 1.0)
    assert (one.image.pixels == PIXELS).all()
    assert app.squares.finished[-1].controls == ()
    assert len(answer.json()["images"]) == 1
    said = json.dumps(json.loads(answer.json()["info"]))
    assert all(word in said for word in ("ip-adapter_other is not here", "FaceID are not read", "weight is not within"))


def test_a_unit_without_an_image_has_the_input_image(app: RunningApp) -> None:
    """At image to image; at text to image it is refused."""
    unit = {"module": "ip-adapter-auto", "model": FIRST}
    (prompt,) = drawn(app, with_units(app, unit, path="img2img", init_images=[TEXT]))
    assert (prompt.image.pixels == PIXELS).all()
    assert with_units(app, unit).status_code == 422


def test_the_extensions_lists_have_the_adapters(app: RunningApp) -> None:
    """And their detector."""
    assert {FIRST, FACE} <= {*app.client.get("/controlnet/model_list").json()["model_list"]}
    assert "ip-adapter-auto" in app.client.get("/controlnet/module_list").json()["module_list"]
