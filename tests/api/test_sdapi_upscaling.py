"""AUTOMATIC1111's `extra-single-image` and `extra-batch-images`: images are enlarged by filters and networks."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from conftest import RunningApp
from fakes import disc, file_of
from live_servers import LiveServer
from PIL import Image

from stable_diffusion_server.app import upscalers as app_upscalers

SINGLE, BATCH = "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"
PIXELS = disc(60, 40)
PICTURE = base64.b64encode(file_of(PIXELS)).decode()


def enlarged(running_app: RunningApp, **changes: Any) -> httpx.Response:
    return running_app.client.post(SINGLE, json={"image": PICTURE, "upscaler_1": "Lanczos", **changes})


def image_of(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["image"])))


SIZES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({}, (120, 80)),
    ({"upscaling_resize": 4}, (240, 160)),
    ({"upscaling_resize": "1.5"}, (90, 60)),
    ({"upscaling_resize": 0.5}, (30, 20)),
    ({"upscaling_resize": 0.001}, (1, 1)),
    ({"resize_mode": 1, "upscaling_resize_w": 200, "upscaling_resize_h": 100}, (200, 100)),
    ({"resize_mode": "1", "upscaling_resize_w": "100", "upscaling_resize_h": 200.0}, (100, 200)),
    ({"resize_mode": 1, "upscaling_resize_w": 200, "upscaling_resize_h": 100, "upscaling_crop": False}, (200, 133)),
    ({"resize_mode": None, "upscaling_resize": None}, (120, 80)),
    ({"upscaler_1": "None"}, (60, 40)),
    ({"upscaler_1": "none", "resize_mode": 1}, (60, 40)),
]


def test_an_image_gets_the_size_asked_for(running_app: RunningApp) -> None:
    """By a factor, or to a width and height with or without cropping; numbers also as texts; null is the default."""
    for changes, size in SIZES:
        assert image_of(enlarged(running_app, **changes)).size == size, changes


def test_the_pixels_are_those_of_the_filter(running_app: RunningApp) -> None:
    """Lanczos and nearest as Pillow has them; cropping keeps the middle; two upscalers are mixed."""
    source = Image.fromarray(PIXELS)
    lanczos = np.asarray(source.resize((120, 80), Image.Resampling.LANCZOS)).astype(int)
    nearest = np.asarray(source.resize((120, 80), Image.Resampling.NEAREST)).astype(int)
    assert (np.asarray(image_of(enlarged(running_app))) == lanczos).all()
    assert (np.asarray(image_of(enlarged(running_app, upscaler_1="Nearest"))) == nearest).all()
    mixed = enlarged(running_app, upscaler_2="Nearest", extras_upscaler_2_visibility="0.5")
    assert np.abs(np.asarray(image_of(mixed)) - (lanczos + nearest) / 2).max() <= 1
    square = enlarged(running_app, resize_mode=1, upscaling_resize_w=40, upscaling_resize_h=40)
    assert (np.asarray(image_of(square)) == PIXELS[:, 10:50]).all()


def test_an_unknown_upscaler_is_replaced_and_reported(running_app: RunningApp) -> None:
    """Clients have such a name as their default; `html_info` is HTML, so the name is escaped in it."""
    for name in ("R-ESRGAN 4x+", "ESRGAN_4x", "SwinIR_4x", "<script>"):
        answer = enlarged(running_app, upscaler_1=name, gfpgan_visibility=1)
        assert image_of(answer).size == (120, 80)
        said = answer.json()["html_info"]
        assert "Lanczos" in said
        assert "gfpgan_visibility" in said
        assert "<script>" not in said
    assert enlarged(running_app, upscaler_1="lanczos").json()["html_info"] == ""


def test_several_images_are_enlarged(running_app: RunningApp) -> None:
    """In their order, each to its own size."""
    images = [{"data": base64.b64encode(file_of(disc(side, 20))).decode(), "name": f"{side}.png"} for side in (20, 30)]
    answer = running_app.client.post(BATCH, json={"imageList": images, "upscaler_1": "Lanczos"})
    sizes = [Image.open(io.BytesIO(base64.b64decode(text))).size for text in answer.json()["images"]]
    assert sizes == [(40, 40), (60, 40)]


def test_the_client_library_enlarges(live_of: Callable[..., LiveServer]) -> None:
    """The methods of webuiapi for one image and for several."""
    client = webuiapi.WebUIApi(baseurl=f"{live_of().url}/sdapi/v1")
    client.session.headers["Connection"] = "close"
    image = Image.fromarray(PIXELS)
    one = client.extra_single_image(image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert one.image.size == (120, 80)
    several = client.extra_batch_images([image, image], upscaler_1=webuiapi.Upscaler.ESRGAN_4x, upscaling_resize=2)
    assert [part.size for part in several.images] == [(120, 80)] * 2
    client.session.close()


def test_an_enlarged_image_still_tells_how_it_was_made(running_app: RunningApp) -> None:
    """The record of a generated image stays in the file, in the caller's format; an image without one gets none."""
    asked = {"prompt": "a red square", "width": 64, "height": 64, "seed": 7}
    made = running_app.client.post("/sdapi/v1/txt2img", json=asked).json()["images"][0]
    running_app.client.post("/sdapi/v1/options", json={"samples_format": "webp"})
    answer = enlarged(running_app, image=made)
    assert image_of(answer).format == "WEBP"
    answered = running_app.client.post("/sdapi/v1/png-info", json={"image": answer.json()["image"]}).json()
    assert "Seed: 7" in answered["info"]
    plain = running_app.client.post("/sdapi/v1/png-info", json={"image": enlarged(running_app).json()["image"]})
    assert plain.json()["info"] == ""


BOMB = base64.b64encode(file_of(np.zeros((5000, 5000, 3), np.uint8))).decode()
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (SINGLE, {}, "image"),
    (SINGLE, {"image": ""}, "image"),
    (SINGLE, {"image": "%"}, "image"),
    (SINGLE, {"image": 7}, "image"),
    (SINGLE, {"image": base64.b64encode(b"no image").decode()}, "image"),
    (SINGLE, {"image": BOMB}, "image"),
    (SINGLE, {"image": PICTURE, "upscaling_resize": 100}, "image"),
    (SINGLE, {"image": PICTURE, "upscaling_resize": 1e300}, "upscaling_resize"),
    (SINGLE, {"image": PICTURE, "upscaling_resize": 0}, "upscaling_resize"),
    (SINGLE, {"image": PICTURE, "upscaling_resize": "twice"}, "upscaling_resize"),
    (SINGLE, {"image": PICTURE, "upscaling_resize": "nan"}, "upscaling_resize"),
    (SINGLE, {"image": PICTURE, "resize_mode": 2}, "resize_mode"),
    (SINGLE, {"image": PICTURE, "upscaling_resize_w": 0}, "upscaling_resize_w"),
    (SINGLE, {"image": PICTURE, "upscaling_resize_h": 99_999}, "upscaling_resize_h"),
    (SINGLE, {"image": PICTURE, "extras_upscaler_2_visibility": 2}, "extras_upscaler_2_visibility"),
    (SINGLE, {"image": PICTURE, "upscaler_1": "a" * 300}, "upscaler_1"),
    (SINGLE, {"image": base64.b64encode(file_of(disc(1, 300))).decode(), "upscaling_resize": 90}, "image"),
    (BATCH, {}, "imageList"),
    (BATCH, {"imageList": []}, "imageList"),
    (BATCH, {"imageList": [PICTURE]}, "imageList"),
    (BATCH, {"imageList": [{"data": PICTURE}] * 33}, "imageList"),
    (BATCH, {"imageList": [{"data": PICTURE}] * 8, "upscaling_resize": 40}, "imageList"),
]


def test_what_cannot_be_enlarged_is_refused(running_app: RunningApp) -> None:
    """By the name of the parameter: no image, a bomb, a result that one response cannot hold, bounds."""
    for path, body, field in REFUSED:
        answer = running_app.client.post(path, json={"upscaler_1": "Lanczos", **body})
        assert answer.status_code in (415, 422), (str(body)[:100], answer.text[:300])
        assert answer.json()["errors"][0]["field"] == field, (str(body)[:100], answer.text[:300])


def test_one_caller_leaves_the_threads_to_others(run_app: Callable[..., RunningApp]) -> None:
    """Thirty requests of one key: some are refused with 429, and another key's request is answered."""
    running_app = run_app(api_keys="ann:a, bob:b")
    body = {"image": PICTURE, "upscaler_1": "Lanczos", "upscaling_resize": 30}

    def ask(key: str) -> int:
        return int(running_app.client.post(SINGLE, json=body, headers={"X-API-Key": key}).status_code)

    with ThreadPoolExecutor(31) as pool:
        flood = [pool.submit(ask, "a") for _ in range(30)]
        assert pool.submit(ask, "b").result(60) == 200
        assert {future.result(60) for future in flood} <= {200, 429}


def test_networks_are_listed_and_used_by_name(running_app: RunningApp) -> None:
    """With the factor of their header; the embedded one is nearer to the true disc than Lanczos."""
    listed = {one["name"]: one for one in running_app.client.get("/sdapi/v1/upscalers").json()}
    assert (listed["embedded-2x"]["scale"], listed["embedded-2x"]["model_name"]) == (2.0, "embedded-2x")
    assert listed["Lanczos"]["model_name"] is None
    assert all(one["model_path"] is None for one in listed.values())
    large, errors = Image.fromarray(disc(480, 320)), {}
    true = np.asarray(large.resize((120, 80), Image.Resampling.BOX)).astype(int)
    halved = file_of(np.asarray(large.resize((60, 40), Image.Resampling.BOX)))
    for name in ("embedded-2x", "Lanczos"):
        answer = enlarged(running_app, upscaler_1=name, image=base64.b64encode(halved).decode())
        assert answer.json()["html_info"] == ""
        errors[name] = np.square(np.asarray(image_of(answer)).astype(int) - true).mean()
    assert errors["embedded-2x"] < errors["Lanczos"]
    mixed = enlarged(running_app, upscaler_1="embedded-2x", upscaler_2="Nearest", extras_upscaler_2_visibility=0.5)
    assert image_of(mixed).size == (120, 80)


def test_enlarged_images_have_limits_of_their_own(run_app: Callable[..., RunningApp]) -> None:
    """MAX_UPSCALED_SIDE and MAX_UPSCALED_PIXELS on both sides; MAX_SIDE does not bound them."""
    running_app = run_app(max_side=64, max_upscaled_side=240, max_upscaled_pixels=240 * 160)
    assert image_of(enlarged(running_app, upscaling_resize=4)).size == (240, 160)
    assert enlarged(running_app, upscaling_resize=4.1).json()["errors"][0]["field"] == "image"
    sized = {"resize_mode": 1, "upscaling_resize_w": 240}
    assert image_of(enlarged(running_app, **sized, upscaling_resize_h=160)).size == (240, 160)
    assert enlarged(running_app, **sized, upscaling_resize_h=161).status_code == 422


def test_a_request_is_interrupted_after_its_tile(
    run_app: Callable[..., RunningApp], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/sdapi/v1/progress` shows its tiles; `interrupt` ends it with an error, and the next one works."""
    running_app, reached, go_on = run_app(), threading.Event(), threading.Event()
    real = app_upscalers.Upscalers.enlarge

    def slowly(self: Any, name: str, pixels: Any, width: int, height: int, report: Any) -> Any:
        def watched(done: int, total: int) -> None:
            report(done, total)
            if done == 1:
                reached.set()
                go_on.wait(20)

        return real(self, name, pixels, width, height, watched)

    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", slowly)
    picture = base64.b64encode(file_of(disc(700, 500))).decode()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(enlarged, running_app, image=picture, upscaler_1="embedded-2x")
        assert reached.wait(60)
        progress = running_app.client.get("/sdapi/v1/progress").json()["progress"]
        assert 0 < progress < 1
        running_app.client.post("/sdapi/v1/interrupt")
        go_on.set()
        assert answer.result(60).status_code == 409
    monkeypatch.setattr(app_upscalers.Upscalers, "enlarge", real)
    assert image_of(enlarged(running_app, upscaler_1="embedded-2x")).size == (120, 80)
