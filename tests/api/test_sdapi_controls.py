"""AUTOMATIC1111's ControlNet units: what each becomes, what the lists say, control images in the response."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import RunningApp
from control_networks import guided_app
from fakes import disc, file_of
from PIL import Image

from stable_diffusion_server.imaging import canny, fit_image
from stable_diffusion_server.types import ControlImage, ControlKind, ControlMode, Fit

pytestmark = pytest.mark.slow
__all__ = ["guided_app"]

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
PIXELS = disc(128, 128)
PICTURE = base64.b64encode(file_of(PIXELS)).decode()
WHITE_HALF = np.zeros((128, 128, 3), np.uint8)
WHITE_HALF[:, 64:] = 255
HALF = base64.b64encode(file_of(WHITE_HALF)).decode()
ASKED = {"prompt": "a red square", "width": 128, "height": 128, "seed": 3, "steps": 2}


@pytest.fixture
def app(guided_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app whose SDXL has networks."""
    return guided_app()


def asked(app: RunningApp, *units: dict[str, Any], path: str = TXT2IMG, **more: Any) -> tuple[Any, dict[str, Any]]:
    body = {**ASKED, **more, "alwayson_scripts": {"ControlNet": {"args": [*units]}}}
    answer = app.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json(), json.loads(answer.json()["info"])


def controls(app: RunningApp) -> tuple[ControlImage, ...]:
    return app.squares.finished[-1].controls


def picture(body: Any, number: int) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body["images"][number]))).convert("RGB"))


def test_all_enabled_units_are_followed_in_their_order(app: RunningApp) -> None:
    """Two detectors and a disabled unit; text to image stays that; both control images follow the picture."""
    edges = {"module": "canny", "model": "promax [0f0f0f0f]", "image": PICTURE, "weight": 0.6, "pixel_perfect": True}
    edges |= {"threshold_a": 50, "threshold_b": 150, "control_mode": 2, "guidance_start": 0.1, "guidance_end": 0.7}
    ready = {"module": "none", "model": "depth-sdxl", "image": {"image": PICTURE, "mask": HALF}, "resize_mode": 0}
    off = {"module": "canny", "enabled": False}
    body, info = asked(app, edges, off, ready)
    one, two = controls(app)
    assert (one.network, one.kind, one.weight, one.start, one.end) == ("promax", ControlKind.CANNY, 0.6, 0.1, 0.7)
    assert one.mode is ControlMode.CONTROL
    assert (one.image.pixels == canny(PIXELS, 50, 150)).all()
    assert (two.network, two.kind, two.weight, two.mode) == ("depth-sdxl", ControlKind.DEPTH, 1.0, ControlMode.BALANCED)
    assert (two.image.pixels == PIXELS).all()
    assert two.mask is not None
    assert (two.mask.pixels == WHITE_HALF[..., 0]).all()
    assert app.squares.finished[-1].image is None
    assert len(body["images"]) == 3
    assert (picture(body, 1) == one.image.pixels).all()
    assert (picture(body, 2) == two.image.pixels).all()
    assert info["not_honoured"] == []
    texts = info["extra_generation_params"]
    assert texts["ControlNet 0"] == (
        "Module: canny, Model: promax [0f0f0f0f], Weight: 0.6, Resize Mode: Crop and Resize, Threshold A: 50, "
        "Threshold B: 150, Guidance Start: 0.1, Guidance End: 0.7, Pixel Perfect: True, "
        "Control Mode: ControlNet is more important"
    )
    assert texts["ControlNet 1"].startswith("Module: none, Model: depth-sdxl [dededede], Weight: 1, Resize Mode: Just")
    _, again = asked(app, infotext=info["infotexts"][0])
    assert "ControlNet" not in "".join(again["infotexts"])


def test_a_plain_unit_of_edges_is_what_canny_asks_for(app: RunningApp) -> None:
    """As before there were control units, so its key is the same; anything more makes it a control unit."""
    unit = {"module": "canny", "image": PICTURE, "weight": 0.8}
    asked(app, unit)
    job = app.squares.finished[-1]
    assert (job.controls, job.control is not None, job.control_scale, job.strength) == ((), True, 0.8, 1.0)
    for more in ({"guidance_end": 0.5}, {"control_mode": 1}, {"mask": HALF}, {"model": "promax"}):
        asked(app, {**unit, **more})
        assert len(controls(app)) == 1, more
        assert app.squares.finished[-1].control is None


def test_a_unit_without_an_image_follows_the_input_image(app: RunningApp) -> None:
    """In img2img; a map that is not wanted is left out."""
    units = ({"module": "canny", "model": "promax", "save_detected_map": False, "pixel_perfect": True},)
    body, _ = asked(app, *units, path=IMG2IMG, init_images=[PICTURE])
    assert (controls(app)[0].image.pixels == canny(PIXELS)).all()
    assert len(body["images"]) == 1


def test_a_unit_follows_the_part_that_is_drawn_at_full_size(app: RunningApp) -> None:
    """Inpaint at full resolution: the control image is that of the box around the mask, enlarged."""
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[64:128, 64:128] = 255
    more = {"init_images": [PICTURE], "mask": base64.b64encode(file_of(mask)).decode(), "inpaint_full_res": True}
    units = [{"module": "none", "model": "depth-sdxl", "image": PICTURE}, {"module": "inpaint_only"}]
    asked(app, *units, path=IMG2IMG, inpaint_full_res_padding=0, **more)
    own, inpaint = controls(app)
    enlarged = fit_image(np.ascontiguousarray(PIXELS[64:, 64:]), 128, 128, Fit.STRETCH)
    assert (own.image.pixels == enlarged).all()
    assert (inpaint.network, inpaint.kind) == ("inpaint-sdxl", ControlKind.INPAINT)
    assert inpaint.mask is not None
    assert (inpaint.mask.pixels == 255).all()


def test_what_cannot_be_followed_is_told(app: RunningApp) -> None:
    """Unknown detectors, detectors without their files, networks of no known kind; the others are drawn."""
    units = [
        {"module": "reference_only", "image": PICTURE},
        {"module": "openpose_full", "model": "promax", "image": PICTURE},
        {"module": "none", "model": "ip-adapter", "image": PICTURE},
        {"module": "canny", "image": PICTURE, "guidance_start": 0.9, "guidance_end": 0.2},
        {"module": "canny", "model": "control_v11p_sd15_canny [d14c016b]", "image": PICTURE},
    ]
    _, info = asked(app, *units)
    (followed,) = controls(app)
    told = " ".join(info["not_honoured"])
    assert followed.network == "canny-sdxl"
    for words in ("reference_only", "openpose_full", "ip-adapter", "ends before it starts", "control_v11p_sd15_canny"):
        assert words in told


def test_the_lists_name_networks_and_detectors_by_kind(app: RunningApp) -> None:
    """The union is in several; tasks that nothing here is for are left out."""
    models = app.client.get("/controlnet/model_list").json()["model_list"]
    assert {"promax", "depth-sdxl"} <= {*models}
    types = app.client.get("/controlnet/control_types").json()["control_types"]
    assert types["Depth"]["default_model"] == "depth-sdxl"
    assert "promax" in types["Tile"]["model_list"]
    assert types["Tile"]["default_option"] == "tile_resample"
    assert types["All"]["model_list"] == ["None", *models]
    assert "Segmentation" not in types


def test_detect_makes_what_a_request_follows(app: RunningApp) -> None:
    """Each detector in the list answers an image; numbers out of range are its defaults."""
    modules = app.client.get("/controlnet/module_list").json()["module_list"]
    for module in modules:
        asked_for = {"controlnet_module": module, "controlnet_input_images": [PICTURE], "controlnet_processor_res": 64}
        answer = app.client.post("/controlnet/detect", json={**asked_for, "controlnet_threshold_a": 1e9})
        assert answer.status_code == 200, module
        assert len(answer.json()["images"]) == 1


NOT_TAKEN: tuple[tuple[str, Any], ...] = (
    ("100 units", [{"module": "canny", "image": PICTURE}] * 100),
    ("more than MAX_CONTROLS", [{"module": "canny", "image": PICTURE, "model": "promax"}] * 5),
    ("a weight of 3", [{"module": "canny", "image": PICTURE, "model": "promax", "weight": 3}]),
    ("a weight below 0", [{"module": "canny", "image": PICTURE, "model": "promax", "weight": -1}]),
    ("a mode of 3", [{"module": "canny", "image": PICTURE, "control_mode": 3}]),
    ("a mode that is a list", [{"module": "canny", "image": PICTURE, "control_mode": ["Balanced"]}]),
    ("a resize mode that is none", [{"module": "canny", "image": PICTURE, "resize_mode": "Tear"}]),
    ("a module that is a number", [{"module": 5, "image": PICTURE}]),
    ("a module of 10,000 letters", [{"module": "a" * 10_000, "image": PICTURE}]),
    ("a path for an image", [{"module": "canny", "model": "promax", "image": "/etc/passwd"}]),
    ("a mask that is none", [{"module": "canny", "model": "promax", "image": PICTURE, "mask": "%"}]),
    ("no image", [{"module": "canny", "model": "promax"}]),
    ("a number of 400 digits", [{"module": "canny", "image": PICTURE, "weight": "9" * 400}]),
)


@pytest.mark.parametrize("units", [case[1] for case in NOT_TAKEN], ids=[case[0] for case in NOT_TAKEN])
def test_malformed_units_are_refused(app: RunningApp, units: Any) -> None:
    """By the name of the scripts, with nothing drawn."""
    body = {**ASKED, "alwayson_scripts": {"ControlNet": {"args": units}}}
    answer = app.client.post(TXT2IMG, json=body)
    assert answer.status_code in (415, 422), answer.text
    assert answer.json()["errors"][0]["field"] == "alwayson_scripts"
    assert app.squares.prepared == []
    assert len(answer.content) < 5000
