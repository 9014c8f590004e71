"""`mask_mode` at our route and AUTOMATIC1111's Soft Inpainting: what reaches the model, keys, and refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import COLOURS, FakeImageDenoiser, disc, file_of
from PIL import Image

pytestmark = pytest.mark.slow

INPAINT = "/inpaint_and_upload_image"
PIXELS = disc(128, 128)
LEVELS = np.repeat(np.array([0, 90, 160, 255], np.uint8), 32)
FILES = {
    "image_file": file_of(PIXELS),
    "mask_file": file_of(np.broadcast_to(LEVELS[None, :, None], (128, 128, 3)).copy()),
}


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app with fake image models."""
    return run_app(FakeImageDenoiser())


def post(app: RunningApp, files: dict[str, bytes] | None = None, **words: Any) -> httpx.Response:
    return app.client.post(INPAINT, data={"prompt": "a red square", **words}, files=files or FILES)


def test_the_levels_reach_the_model_and_black_stays_exact(app: RunningApp) -> None:
    """Soft, every level is one of the model's and new pixels are taken whole; hard, the mask is black and white."""
    answer = post(app, mask_mode="soft", format="png")
    assert answer.status_code == 200, answer.text
    made = np.asarray(Image.open(io.BytesIO(app.client.get(answer.json()["path"]).content)).convert("RGB"))
    assert (made[:, :32] == PIXELS[:, :32]).all()
    assert np.abs(made[:, 32:].astype(int) - COLOURS["red"]).mean() < 20
    (job,) = app.squares.finished
    assert job.soft
    assert job.mask is not None
    assert len(np.unique(job.mask.pixels)) == 4
    post(app)
    hard = app.squares.finished[-1]
    assert not hard.soft
    assert len(np.unique(hard.mask.pixels)) == 2


def test_a_feather_is_a_level_of_a_soft_mask(app: RunningApp) -> None:
    """A white mask rises inwards from its border."""
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[:, 64:] = 255
    post(app, {**FILES, "mask_file": file_of(mask)}, mask_mode="soft", feather=16)
    levels = app.squares.finished[-1].mask.pixels[64].astype(int)
    assert (levels[:64] == 0).all()
    assert (np.diff(levels[64:80]) > 0).all()
    assert (levels[80:] == 255).all()


def test_soft_is_another_picture_and_hard_is_the_one_of_before(app: RunningApp) -> None:
    """The key of a request without `mask_mode` is that of `hard`; a soft one is drawn again from its record."""
    plain, hard, soft = post(app), post(app, mask_mode="hard"), post(app, mask_mode="soft", format="png")
    assert (hard.json()["cached"], hard.json()["key"]) == (True, plain.json()["key"])
    assert soft.json()["key"] != plain.json()["key"]
    picture = app.client.get(soft.json()["path"]).content
    answer = app.client.post("/v1/replay", files={**FILES, "picture_file": picture})
    assert answer.json()["replay"] == {"same_order": True, "equal": True, "decibels": None}


@pytest.mark.parametrize("mode", ["", "SOFT", "grey", "1", "x" * 5000])
def test_another_mode_is_refused_by_name(app: RunningApp, mode: str) -> None:
    """Nothing is drawn."""
    answer = post(app, mask_mode=mode)
    assert (answer.status_code, answer.json()["field"]) == (422, "mask_mode")
    assert app.squares.finished == []


@pytest.mark.parametrize(
    ("args", "soft", "told"),
    [
        ([True], True, 0),
        ([True, 1, 0.5, 4, 0, 0.5, 2], True, 0),
        ([True, 2, 0.5], True, 1),
        ([True, {"a": [1]}], True, 1),
        ([False, 2], False, 0),
        ([], False, 0),
        ({"enabled": True}, False, 0),
        (None, False, 0),
    ],
)
def test_automatic1111s_soft_inpainting(app: RunningApp, args: Any, soft: bool, told: int) -> None:
    """Its first argument enables it; other arguments than its defaults are told."""
    image, mask = (base64.b64encode(FILES[name]).decode() for name in ("image_file", "mask_file"))
    body = {"prompt": "a red square", "init_images": [image], "mask": mask, "width": 128, "height": 128}
    scripts = {"Soft Inpainting": {"args": args}}
    answer = app.client.post("/sdapi/v1/img2img", json={**body, "alwayson_scripts": scripts, "inpaint_full_res": False})
    assert answer.status_code == 200, answer.text
    assert app.squares.finished[-1].soft is soft
    assert len(json.loads(answer.json()["info"]).get("not_honoured", [])) == told
