"""Control units with the embedded models in a server process: pictures keep the edges at every endpoint."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from conftest import Server
from fakes import disc, file_of
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.imaging import canny

SIDE = 256
SCENE = disc(SIDE, SIDE, "red", "blue")
FILE = file_of(SCENE)
PICTURE = base64.b64encode(FILE).decode()
# With a mask an AUTOMATIC1111 unit is a control unit, and not the short form of `canny`.
WHITE = base64.b64encode(file_of(np.full_like(SCENE, 255))).decode()
PROMPT = "a yellow square on a green background"
SIZE = {"width": SIDE, "height": SIDE}
UNIT = {"kind": "canny", "weight": 1.0, "image": PICTURE}
# Pixels by which a drawn edge may lie beside the one that it follows.
_NEAR = np.ones((5, 5), np.uint8)
# Measured: 1.0 with units and with `canny=true`.
LEAST, UNGUIDED = 0.9, 0.5


def f_measure(made: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """The F-measure of the edges of an image, height × width × 3, against those of another, within two pixels."""
    drawn, asked = (canny(pixels)[..., 0] > 0 for pixels in (made, wanted))
    near_drawn, near_asked = (cv2.dilate(edges.astype(np.uint8), _NEAR) > 0 for edges in (drawn, asked))
    precision = (drawn & near_asked).sum() / max(1, drawn.sum())
    recall = (asked & near_drawn).sum() / max(1, asked.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


def pixels_of(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def answered(server: Server, path: str, body: Mapping[str, Any]) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_ours(server: Server, units: list[Any], seed: int) -> NDArray[np.uint8]:
    body = {"prompt": PROMPT, "format": "png", "seed": seed, **SIZE, "controls": units}
    return pixels_of(httpx.get(answered(server, "/create_and_upload_image", body)["path"]).content)


def by_image(server: Server, units: list[Any], seed: int) -> NDArray[np.uint8]:
    body = {
        "prompt": PROMPT,
        "format": "png",
        "seed": seed,
        "strength": 1.0,
        "image_url": f"data:image/png;base64,{PICTURE}",
    }
    given = [{name: value for name, value in unit.items() if name != "image"} for unit in units]
    path = answered(server, "/style_transfer_and_upload_image", {**body, "controls": given})["path"]
    return pixels_of(httpx.get(path).content)


def by_automatic1111(server: Server, units: list[Any], seed: int) -> NDArray[np.uint8]:
    sent = [{"module": "canny", "image": PICTURE, "weight": 1.0, "mask": WHITE, "pixel_perfect": True}]
    scripts = {"ControlNet": {"args": sent if units else []}}
    body = answered(server, "/sdapi/v1/txt2img", {"prompt": PROMPT, "seed": seed, **SIZE, "alwayson_scripts": scripts})
    assert not units or "ControlNet 0" in json.loads(body["info"])["extra_generation_params"]
    return pixels_of(base64.b64decode(body["images"][0]))


def by_openai(server: Server, units: list[Any], seed: int) -> NDArray[np.uint8]:
    body = {"prompt": PROMPT, "size": f"{SIDE}x{SIDE}", "seed": seed, "response_format": "b64_json", "controls": units}
    return pixels_of(base64.b64decode(answered(server, "/v1/images/generations", body)["data"][0]["b64_json"]))


def by_canny(server: Server, seed: int) -> NDArray[np.uint8]:
    body = {"prompt": PROMPT, "format": "png", "seed": seed, "strength": 1.0, "canny": True, "control_scale": 1.0}
    body |= {"image_url": f"data:image/png;base64,{PICTURE}"}
    return pixels_of(httpx.get(answered(server, "/style_transfer_and_upload_image", body)["path"]).content)


@pytest.mark.parametrize("draw", [by_ours, by_image, by_automatic1111, by_openai])
def test_edges_are_followed_as_canny_follows_them(
    server: Server, draw: Callable[[Server, list[Any], int], NDArray[np.uint8]]
) -> None:
    """A disc's edges under a prompt for a square: about as near as with `canny`, and far from it without units."""
    guided = np.mean([f_measure(draw(server, [UNIT], seed), SCENE) for seed in (1, 2)])
    usual = np.mean([f_measure(by_canny(server, seed), SCENE) for seed in (1, 2)])
    print(draw.__name__, round(float(guided), 3), "canny", round(float(usual), 3))  # noqa: T201  # shown with -s
    assert guided > max(LEAST, usual - 0.05)
    if draw is not by_image:
        assert f_measure(draw(server, [], 1), SCENE) < UNGUIDED


def test_a_unit_of_the_input_image_is_canny_bit_for_bit(server: Server) -> None:
    """The same network, edges and weight: the pictures are equal."""
    (one, other) = (by_image(server, [{**UNIT}], 3), by_canny(server, 3))
    assert np.abs(one.astype(int) - other).max() <= 2
