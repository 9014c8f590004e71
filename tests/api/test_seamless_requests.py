"""`tiling` in every dialect: what reaches the model, what is refused by name, and what AUTOMATIC1111's `info` says."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of

from stable_diffusion_server.types import Tiling

pytestmark = pytest.mark.slow

CREATE, STYLE, INPAINT = (
    "/create_and_upload_image",
    "/style_transfer_and_upload_image",
    "/inpaint_and_upload_image",
)
A1111 = "/sdapi/v1/txt2img"
SQUARE = {"prompt": "a red square", "width": 128, "height": 128}


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app with fake image models."""
    return run_app(FakeImageDenoiser())


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


@pytest.mark.parametrize("tiling", [*Tiling])
def test_tiling_reaches_the_model_and_is_drawn_again(app: RunningApp, tiling: Tiling) -> None:
    """It is part of the key, of the record, and of a replay; without it the key is another."""
    plain = app.client.post(CREATE, json={**SQUARE, "seed": 3}).json()
    body = app.client.post(CREATE, json={**SQUARE, "seed": 3, "tiling": tiling, "format": "png"}).json()
    assert app.squares.finished[-1].tiling is tiling
    assert app.squares.finished[-1].shape != app.squares.finished[0].shape
    assert body["key"] != plain["key"]
    picture = app.client.get(body["path"]).content
    answer = app.client.post("/v1/replay", files={"picture_file": picture})
    assert answer.json()["replay"] == {"same_order": True, "equal": True, "decibels": None}
    assert app.squares.finished[-1].tiling is tiling


def test_no_tiling_is_the_request_of_before(app: RunningApp) -> None:
    """`null` keeps the key; a job without it has no tiling."""
    first = app.client.post(CREATE, json={**SQUARE, "tiling": None}).json()
    again = app.client.post(CREATE, json=SQUARE).json()
    assert (again["cached"], again["key"]) == (True, first["key"])
    assert app.squares.finished[-1].tiling is None


@pytest.mark.parametrize(
    "body",
    [
        {"tiling": "z"},
        {"tiling": True},
        {"tiling": ["x"]},
        {"tiling": ""},
        {"tiling": "x", "model": "flux"},
        {"tiling": "x", "width": 96},
        {"tiling": "y", "height": 130},
        {"tiling": "both", "width": 2048, "height": 2048},
    ],
)
def test_what_cannot_be_seamless_is_refused_by_name(app: RunningApp, body: dict[str, Any]) -> None:
    """Other values, models without a UNet, sizes that are cut out of another one; nothing is drawn."""
    answer = app.client.post(CREATE, json={**SQUARE, **body})
    assert (answer.status_code, answer.json()["field"]) == (422, "tiling"), answer.text
    assert app.squares.finished == []


@pytest.mark.parametrize(
    "body", [{"tiling": "x", "height": 100}, {"tiling": "y", "width": 100}, {"tiling": "both", "width": 192}]
)
def test_a_border_that_does_not_meet_may_be_cut(app: RunningApp, body: dict[str, Any]) -> None:
    """Only the sides that meet must be multiples of 64."""
    assert app.client.post(CREATE, json={**SQUARE, **body}).status_code == 200


@pytest.mark.parametrize(("size", "status"), [((128, 128), 200), ((128, 192), 200), ((100, 128), 422)])
def test_an_input_image_decides_whether_the_borders_can_meet(
    app: RunningApp, size: tuple[int, int], status: int
) -> None:
    """Its size is known when it was decoded; the error still names the parameter."""
    form = {"prompt": "a red square", "tiling": "both"}
    answer = app.client.post(STYLE, data=form, files={"image_file": file_of(disc(*size))})
    assert answer.status_code == status, answer.text
    if status == 422:
        assert answer.json()["field"] == "tiling"


def test_an_extended_picture_is_not_seamless(app: RunningApp) -> None:
    """Both together are refused before anything is decoded."""
    form = {"prompt": "a red square", "tiling": "x", "extend_left": 64}
    answer = app.client.post(INPAINT, data=form, files={"image_file": file_of(disc(128, 128))})
    assert (answer.status_code, answer.json()["field"]) == (422, "tiling")


def drawn_by_a1111(app: RunningApp, path: str = A1111, **body: Any) -> list[str]:
    """Ask in AUTOMATIC1111's dialect; returns what was not honoured."""
    answer: httpx.Response = app.client.post(path, json={**SQUARE, **body})
    assert answer.status_code == 200, answer.text
    return list(json.loads(answer.json()["info"]).get("not_honoured", []))


def test_automatic1111s_tiling_is_both(app: RunningApp) -> None:
    """In txt2img, with a second pass, in img2img and from an infotext; false is none."""
    image = encoded(file_of(disc(128, 128)))
    assert drawn_by_a1111(app, tiling=True) == []
    assert drawn_by_a1111(app, "/sdapi/v1/img2img", tiling=True, init_images=[image]) == []
    assert drawn_by_a1111(app, infotext="a red square\nSteps: 4, Sampler: Euler, Tiling: True") == []
    assert [job.tiling for job in app.squares.finished] == [Tiling.BOTH] * 3
    assert drawn_by_a1111(app, tiling=True, enable_hr=True, hr_scale=2, denoising_strength=0.5) == []
    assert [job.tiling for job in app.squares.finished[3:]] == [Tiling.BOTH] * 2
    assert drawn_by_a1111(app, tiling=False) == []
    assert app.squares.finished[-1].tiling is None


@pytest.mark.parametrize(
    "body",
    [
        {"override_settings": {"sd_model_checkpoint": "flux"}},
        {"width": 136},
        {"enable_hr": True, "hr_scale": 1.25, "hr_upscaler": "Lanczos", "denoising_strength": 0.5},
    ],
)
def test_automatic1111_is_told_where_no_picture_is_seamless(app: RunningApp, body: dict[str, Any]) -> None:
    """It is drawn without tiling, and `info` says why."""
    told = drawn_by_a1111(app, tiling=True, **body)
    assert [sentence.partition(":")[0] for sentence in told] == ["tiling"]
    assert {job.tiling for job in app.squares.finished} == {None}


def test_a_part_of_a_picture_is_not_seamless_in_automatic1111(app: RunningApp) -> None:
    """Its part alone is drawn by "only masked", whose borders must not meet."""
    image = encoded(file_of(disc(128, 128)))
    body = {"tiling": True, "init_images": [image], "mask": image, "inpaint_full_res": True}
    assert len(drawn_by_a1111(app, "/sdapi/v1/img2img", **body)) == 1
    assert app.squares.finished[-1].tiling is None


def test_openais_dialect_takes_it_too(app: RunningApp) -> None:
    """As a further parameter of the body."""
    body = {"prompt": "a red square", "size": "128x128", "tiling": "x"}
    answer = app.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert app.squares.finished[-1].tiling is Tiling.X
