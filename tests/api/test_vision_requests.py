"""Control images and details by model files in MODELS_DIR, from the request to the model that draws."""

from __future__ import annotations

import base64
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import vision_files
from conftest import RunningApp
from control_networks import guided_app
from fakes import disc, file_of

pytestmark = pytest.mark.slow
__all__ = ["guided_app"]

CREATE = "/create_and_upload_image"
PIXELS = disc(128, 128)
TEXT = base64.b64encode(file_of(PIXELS)).decode()
ASKED = {"prompt": "a red square", "width": 128, "height": 128, "seed": 3}


@pytest.fixture
def annotators(tmp_path: Path) -> Path:
    """The folder of model files of the app, with a network of depth."""
    vision_files.weighted_channels(tmp_path / "models" / "annotators" / "midas.onnx", (1, 0, 0))
    return tmp_path / "models" / "annotators"


@pytest.fixture
def app(guided_app: Callable[..., RunningApp], annotators: Path) -> RunningApp:
    """A running app with those files, whose models may take four seconds."""
    return guided_app(models_dir=(annotators.parent,), models="embedded", vision_timeout=4)


def post(app: RunningApp, **words: Any) -> httpx.Response:
    return app.client.post(CREATE, json={**ASKED, **words})


def guided(app: RunningApp, **unit: Any) -> httpx.Response:
    return post(app, controls=[{"kind": "depth", "image": TEXT, **unit}])


def test_depth_by_a_file_guides_a_picture(app: RunningApp, annotators: Path) -> None:
    """Without a name the first preprocessor of the kind; a replaced file draws anew, the same one does not."""
    answer = guided(app)
    assert answer.status_code == 200, answer.text
    (control,) = app.squares.finished[-1].controls
    red = cv2.resize(PIXELS, (518, 518), interpolation=cv2.INTER_CUBIC)[..., 0].astype(np.float32)
    red = cv2.resize(red, (128, 128), interpolation=cv2.INTER_CUBIC)
    expected = (red - red.min()) / (red.max() - red.min()) * 255
    assert np.abs(control.image.pixels[..., 0] - expected).max() <= 1.5
    assert guided(app, preprocess="depth").json()["cached"] is True
    vision_files.weighted_channels(annotators / "midas.onnx", (0, 1, 0))
    other = guided(app)
    assert (other.json()["cached"], other.json()["key"] == answer.json()["key"]) == (False, False)


def test_a_file_that_is_no_network_is_the_units_fault(app: RunningApp, annotators: Path) -> None:
    """422 with the unit's place and the file's name, and no path of this machine."""
    (annotators / "hed.onnx").write_bytes(pickle.dumps(["x"] * 99))
    vision_files.external(annotators / "zoe.onnx", "../../data/journal.db")
    for name, sentence in (("hed", "not an ONNX file"), ("depth_zoe", "weights in other files")):
        problem = guided(app, preprocess=name)
        assert problem.status_code == 422
        assert problem.json()["field"] == "controls[0].preprocess"
        assert sentence in problem.json()["detail"]
        assert str(annotators.parent.parent) not in problem.text
    missing = guided(app, preprocess="dw_openpose_full")
    assert missing.status_code == 422
    assert "MODELS_DIR/annotators" in missing.json()["detail"]


def test_an_endless_file_costs_its_request_alone(app: RunningApp, annotators: Path) -> None:
    """The server answers meanwhile, without a control image too, and the next control image is made."""
    vision_files.endless(annotators / "zoe.onnx")
    found: list[httpx.Response] = []
    hung = threading.Thread(target=lambda: found.append(guided(app, preprocess="depth_zoe")))
    hung.start()
    assert app.client.get("/healthz").status_code == 200
    assert post(app, seed=4).status_code == 200
    hung.join()
    assert found[0].status_code == 422
    assert "zoe.onnx took too long" in found[0].json()["detail"]
    assert guided(app, preprocess="depth_midas").status_code == 200


def test_a_detector_file_repairs_what_it_finds(app: RunningApp, annotators: Path) -> None:
    """The box of a YOLOv8 file in pixels of the picture; its class by the metadata; an unusable file is refused."""
    detectors = annotators.parent / "detectors"
    rows = np.zeros((1, 5, 84), np.float32)
    rows[0, :, 7] = (32, 32, 16, 16, 0.9)  # of 64 × 64, so twice that of the picture
    vision_files.constant(detectors / "face_yolov8n.onnx", [rows], (64, 64), {0: "face"})
    (detectors / "broken.onnx").write_bytes(b"PK\3\4")
    repair = {"detector": "face_yolov8n.pt", "prompt": "a blue square", "feather": 0, "dilation": 0}
    answer = post(app, repairs=[repair])
    assert answer.status_code == 200, answer.text
    warnings = [warning["message"] for warning in answer.json()["warnings"]]
    assert any("found 1 of what was drawn again" in warning for warning in warnings)
    assert post(app, repairs=[repair]).json()["cached"] is True
    assert post(app, repairs=[{**repair, "detector": "face_yolov8n"}]).status_code == 200
    broken = post(app, repairs=[{**repair, "detector": "broken"}])
    assert broken.status_code == 422
    assert "not an ONNX file" in broken.json()["detail"]


def test_automatic1111_lists_and_runs_what_has_a_file(app: RunningApp, annotators: Path) -> None:
    """`module_list` has the preprocessors with a file; `detect` runs them, and refuses a file that is no network."""
    (annotators / "hed.onnx").write_bytes(b"PK\3\4")
    modules = app.client.get("/controlnet/module_list").json()["module_list"]
    assert {"none", "canny", "depth_midas", "normal_depth", "softedge_hed"} <= {*modules}
    assert not {"depth_zoe", "openpose_full", "lineart_anime"} & {*modules}
    asked = {"controlnet_input_images": [TEXT], "controlnet_processor_res": 64}
    made = app.client.post("/controlnet/detect", json={**asked, "controlnet_module": "depth_midas"})
    assert made.status_code == 200, made.text
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(made.json()["images"][0]), np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    assert (pixels.shape, pixels.min(), pixels.max()) == ((64, 64, 3), 0, 255)
    refused = app.client.post("/controlnet/detect", json={**asked, "controlnet_module": "softedge_hed"})
    assert refused.status_code == 422
    assert "not an ONNX file" in refused.text
