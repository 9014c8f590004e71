"""Detail repair with real detector files, through the three dialects; a file that cannot be used costs one request."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision_files
from conftest import RunningApp
from fakes import FakeImageDenoiser
from PIL import Image

pytestmark = pytest.mark.slow

# Boxes on the detector's 64 × 64 pixels: left, top, right, bottom, score, class.
BOXES = np.array([[[8, 8, 24, 24, 0.9, 0], [40, 40, 56, 56, 0.6, 1], [0, 0, 4, 4, 0.1, 0]]], np.float32)
RED_WITH_BLUE = {"prompt": "red", "width": 64, "height": 64, "seed": 0}
BLUE = {"detector": "faces", "prompt": "blue", "feather": 0, "dilation": 0, "strength": 1.0}


@pytest.fixture
def app(run_app: Callable[..., RunningApp], tmp_path: Path) -> RunningApp:
    """A server with detectors, some of which are hostile."""
    folder = tmp_path / "models" / "detectors"
    vision_files.constant(folder / "faces.onnx", [BOXES], (64, 64))
    vision_files.endless(folder / "endless.onnx")
    vision_files.greedy(folder / "greedy.onnx", 64)
    vision_files.external(folder / "external.onnx", "/etc/passwd")
    (folder / "pickle.onnx").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")
    return run_app(FakeImageDenoiser(), models_dir=[tmp_path / "models"], vision_timeout=5.0)


def pixels_of(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def check(pixels: Any, parts: int) -> None:
    """The first `parts` boxes are blue, the rest is red."""
    is_blue = pixels[..., 2] > pixels[..., 0]
    expected = np.zeros((64, 64), bool)
    for left, top, right, bottom, *_ in BOXES[0, :parts].astype(int):
        expected[top:bottom, left:right] = True
    assert (is_blue == expected).all()


def test_our_route_repairs_what_the_detector_finds(app: RunningApp) -> None:
    """With the least score that the request says; as JSON and as a form."""
    for number, (sent, parts) in enumerate(
        (([BLUE], 2), ([{**BLUE, "confidence": 0.7}], 1), ([{**BLUE, "most": 1}], 1))
    ):
        path = f"made-{number}.png"
        response = app.client.post(
            "/create_and_upload_image", json={**RED_WITH_BLUE, "save_path": path, "repairs": sent}
        )
        assert response.status_code == 200, response.text
        assert f"faces found {parts} " in json.dumps(response.json())
        check(pixels_of(app.client.get(response.json()["path"]).content), parts)
    form = {**RED_WITH_BLUE, "save_path": "form.png", "repairs": json.dumps([BLUE])}
    check(pixels_of(app.client.get(app.client.post("/create_and_upload_image", data=form).json()["path"]).content), 2)


def test_openai_s_clients_send_repairs_as_a_further_parameter(app: RunningApp) -> None:
    """The answer holds the repaired image."""
    body = {"prompt": "red", "size": "64x64", "seed": 0, "repairs": [BLUE], "output_format": "png"}
    response = app.client.post("/v1/images/generations", json={**body, "response_format": "b64_json"})
    assert response.status_code == 200, response.text
    check(pixels_of(base64.b64decode(response.json()["data"][0]["b64_json"])), 2)


def test_adetailer_s_units_repair_in_automatic1111_s_dialect(app: RunningApp) -> None:
    """The extension's lists name the detectors."""
    unit = {"ad_model": "faces.pt", "ad_prompt": "blue", "ad_mask_blur": 0, "ad_dilate_erode": 0}
    body = {"prompt": "red", "width": 64, "height": 64, "seed": 0, "alwayson_scripts": {"ADetailer": {"args": [unit]}}}
    response = app.client.post("/sdapi/v1/txt2img", json=body)
    assert response.status_code == 200, response.text
    check(pixels_of(base64.b64decode(response.json()["images"][0])), 2)
    assert "faces" in app.client.get("/adetailer/v1/ad_model").json()["ad_model"]
    assert "adetailer" in app.client.get("/sdapi/v1/scripts").json()["txt2img"]


@pytest.mark.parametrize("name", ["pickle", "external", "endless", "greedy"])
def test_a_hostile_detector_costs_one_request(app: RunningApp, name: str) -> None:
    """It is refused in a sentence, nothing is stored, and the next request draws."""
    body = {**RED_WITH_BLUE, "save_path": "refused.png", "repairs": [{**BLUE, "detector": name}]}
    response = app.client.post("/create_and_upload_image", json=body)
    assert (response.status_code, response.json()["field"]) == (422, "repairs[0].detector"), response.text
    assert "passwd" not in response.text
    assert app.client.get("/files/static/uploads/refused.png").status_code == 404
    good = app.client.post("/create_and_upload_image", json={**body, "save_path": "good.png", "repairs": [BLUE]})
    check(pixels_of(app.client.get(good.json()["path"]).content), 2)


def test_a_job_keeps_its_repairs(app: RunningApp) -> None:
    """It is drawn from what was stored of it."""
    from fakes import until

    body = {**RED_WITH_BLUE, "save_path": "job.png", "repairs": [BLUE]}
    accepted = app.client.post("/create_and_upload_image", json=body, headers={"Prefer": "respond-async"})
    until(lambda: app.client.get(accepted.headers["location"]).json()["state"] == "done")
    check(pixels_of(app.client.get("/files/static/uploads/job.png").content), 2)
