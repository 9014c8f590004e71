"""Edits and variations: JSON bodies, names of form fields, holes as masks, images without a prompt, hostile bodies."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import RunningApp
from fakes import COLOURS, FakeImageDenoiser, disc, file_of
from live_servers import LiveServer
from numpy.typing import NDArray
from PIL import Image

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PIXELS = disc(96, 80)
FILE = file_of(PIXELS)
TEXT = base64.b64encode(FILE).decode()
URL = f"data:image/png;base64,{TEXT}"


def with_hole(pixels: NDArray[np.uint8], alpha: int = 0) -> bytes:
    """A PNG whose middle is transparent."""
    rgba = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    rgba[20:60, 30:70, 3] = alpha
    return file_of(rgba)


HOLE = with_hole(PIXELS)
HOLE_URL = f"data:image/png;base64,{base64.b64encode(HOLE).decode()}"


def image_of(answer: httpx.Response, number: int = 0) -> NDArray[np.uint8]:
    assert answer.status_code == 200, answer.text
    file = base64.b64decode(answer.json()["data"][number]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    return run_app(FakeImageDenoiser())


def edit(app: RunningApp, body: dict[str, Any], path: str = EDITS) -> httpx.Response:
    return app.client.post(path, json={"prompt": "a green square", "seed": 1, "response_format": "b64_json", **body})


TAKEN: dict[str, dict[str, Any]] = {
    "OpenAI": {"images": [{"image_url": URL}]},
    "with nulls": {"images": [{"image_url": URL, "file_id": None}], "mask": None, "image": None},
    "two": {"images": [{"image_url": URL}, {"image_url": HOLE_URL}]},
    "a data URL": {"image": URL},
    "a list": {"image": [URL]},
    "an object": {"image": {"image_url": URL}},
    "as in chats": {"images": [{"type": "image_url", "image_url": {"url": URL, "detail": "high"}}]},
    "xAI": {"image": {"type": "image_url", "url": URL}},
    "base64": {"image": TEXT},
    "base64 in an object": {"images": [{"b64_json": TEXT}]},
    "lines": {"image": URL[:40] + "\n" + URL[40:]},
}


def test_an_edit_in_json_is_the_edit_of_a_form(app: RunningApp) -> None:
    """However JSON holds the image, the result is that of the same file in a form."""
    form = {"prompt": "a green square", "seed": "1", "response_format": "b64_json"}
    expected = image_of(app.client.post(EDITS, data=form, files={"image": ("a.png", FILE)}))
    for what, body in TAKEN.items():
        assert (image_of(edit(app, body)) == expected).all(), what
    # Without a media type it is JSON, too, and as long as JSON may be.
    long = json.dumps(
        {"prompt": "a green square", "seed": 1, "response_format": "b64_json", "image": URL + " " * 2_000_000}
    )
    for media_type in ({}, {"content-type": "text/plain"}):
        assert (image_of(app.client.post(EDITS, content=long, headers=media_type)) == expected).all()


def test_a_mask_in_json_protects_what_it_leaves_opaque(app: RunningApp) -> None:
    """As an object, or as a data URL."""
    for mask in ({"image_url": HOLE_URL}, HOLE_URL):
        result = image_of(edit(app, {"images": [{"image_url": URL}], "mask": mask, "size": "auto"}))
        outside = np.ones(PIXELS.shape[:2], bool)
        outside[20:60, 30:70] = False
        assert (result[outside] == PIXELS[outside]).all()
        assert np.abs(result[25:55, 35:65].astype(int) - COLOURS["green"]).max() <= 16


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "a file id": ({"images": [{"file_id": "file-abc"}]}, 400, "images", "file_id"),
    "a file id as mask": ({"image": URL, "mask": {"file_id": "file-abc"}}, 400, "mask", "file_id"),
    "a file id beside": ({"images": [{"image_url": URL, "file_id": "x"}]}, 400, "images", "file_id"),
    "nothing": ({}, 400, "image", "must be sent as a file"),
    "an empty list": ({"images": []}, 400, "image", "must be sent as a file"),
    "a word": ({"image": "abc"}, 400, "image", "must be sent as a file"),
    "a number": ({"image": 7}, 400, "image", "must be sent as a file"),
    "a list of lists": ({"images": [[URL]]}, 400, "images", "must be sent as a file"),
    "an empty object": ({"images": [{}]}, 400, "images", "image_url"),
    "two at once": ({"images": [{"image_url": URL, "url": URL}]}, 400, "images", "image_url"),
    "more": ({"images": [{"image_url": URL, "weight": 1}]}, 400, "images", "image_url"),
    "deeper": ({"images": [{"image_url": {"url": {"url": URL}}}]}, 400, "images", "must be sent as a file"),
    "no base64": ({"image": "data:image/png;base64,%%%"}, 400, "image", "base64"),
    "another scheme": ({"image": "file:///etc/passwd"}, 400, "image", "must be sent as a file"),
    "this machine": ({"image": "http://127.0.0.1:8000/files/a.png"}, 400, "image", ""),
    "a cloud's own": ({"images": [{"image_url": "http://169.254.169.254/latest"}]}, 400, "image", ""),
    "a mask of this machine": ({"image": URL, "mask": "http://localhost/"}, 400, "mask", ""),
    "no picture": ({"image": "data:image/png;base64,AAAA"}, 415, "image", ""),
    "33 pictures": ({"images": [{"image_url": "data:," + "a" * 5000}] * 33}, 413, "images", "32"),
    "a long text elsewhere": ({"image": URL, "user": "a" * 900_000}, 400, "user", ""),
    "two faults": ({"images": [{"file_id": "x"}], "n": 0, "size": "huge"}, 400, "images", "size"),
}


def test_what_is_no_image_is_refused_by_name(app: RunningApp) -> None:
    """4xx with the parameter, before anything is drawn; addresses by the rules of all downloads."""
    for what, (body, status, param, words) in REFUSED.items():
        answer = edit(app, body)
        assert answer.status_code == status, (what, answer.text[:300])
        error = answer.json()["error"]
        assert error["param"] == param, (what, error)
        assert words in error["message"], (what, error)
        assert URL[100:200] not in answer.text
    assert app.squares.prepared == []


def test_bodies_are_bounded_before_they_are_read(run_app: Callable[..., RunningApp]) -> None:
    """Depth, values, one picture, the whole body; without a media type as with one."""
    app = run_app(FakeImageDenoiser(), max_image_bytes=100_000, max_upload_bytes=300_000, max_body_bytes=60_000)
    bodies: dict[str, tuple[str, int]] = {
        "deep": ('{"images":' + "[" * 5000 + "]" * 5000 + "}", 400),
        "many": ('{"images":[' + "{}," * 5000 + "{}]}", 400),
        "a large picture": (json.dumps({"prompt": "a", "image": "data:image/png;base64," + "A" * 200_000}), 413),
        "a large body": (json.dumps({"prompt": "a", "images": [URL, "A" * 400_000]}), 413),
        "a large text": (json.dumps({"prompt": "a" * 100_000, "image": URL}), 413),
    }
    for path in (EDITS, VARIATIONS):
        for what, (body, status) in bodies.items():
            for headers in ({"content-type": "application/json"}, {}):
                answer = app.client.post(path, content=body, headers=headers)
                assert answer.status_code == status, (path, what, answer.text[:200])
                assert "error" in answer.json()
    assert app.squares.prepared == []


MISNUMBERED = "image[x] image[-1] image[0 image0 image[0][0] image[\u0663] image[00000] mask[0] [0] []".split()


def test_a_form_may_number_its_images(app: RunningApp) -> None:
    """`image[0]` of PHP, `image[]`, `image`; the one with the lowest number is edited."""
    form = {"prompt": "a green square", "seed": "1", "response_format": "b64_json"}
    other = file_of(disc(64, 64, "white", "black"))
    expected = image_of(app.client.post(EDITS, data=form, files={"image": ("a.png", FILE)}))
    for files in (
        [("image[0]", FILE)],
        [("image[0]", FILE), ("image[1]", other)],
        [("image[1]", other), ("image[0]", FILE)],
        [("image[10]", other), ("image[9]", FILE)],
        [("image[]", FILE), ("image[]", other)],
        [("image", FILE), ("image", other)],
    ):
        answer = app.client.post(EDITS, data=form, files=[(name, ("a.png", file)) for name, file in files])
        assert (image_of(answer) == expected).all(), [name for name, _ in files]
        assert ("images-unused" in answer.text) is (len(files) > 1)
    drawn = len(app.squares.prepared)
    for name in MISNUMBERED:
        answer = app.client.post(EDITS, data=form, files={"image": ("a.png", FILE), name: ("b.png", FILE)})
        assert answer.status_code in (400, 422), (name, answer.text)
    assert app.client.post(EDITS, data=form, files=[("image[0]", ("a.png", FILE))] * 40).status_code == 400
    assert len(app.squares.prepared) == drawn


def test_a_hole_in_the_image_is_its_mask_for_dall_e_2(app: RunningApp) -> None:
    """What surrounds the hole stays; images without one, and other models, are redrawn as a whole."""
    outside = np.ones(PIXELS.shape[:2], bool)
    outside[20:60, 30:70] = False
    form = {"prompt": "a green square", "response_format": "b64_json", "size": "auto"}

    def kept(model: str, file: bytes, **more: str) -> bool:
        answer = app.client.post(EDITS, data={**form, "model": model, **more}, files={"image": ("a.png", file)})
        return bool((image_of(answer)[outside] == PIXELS[outside]).all())

    assert kept("dall-e-2", HOLE)
    assert kept("dall-e-2", HOLE, n="2")
    assert app.squares.finished[-1].strength == 1.0
    assert not kept("dall-e-2", FILE)
    assert not kept("dall-e-2", with_hole(PIXELS, 128))  # half transparent is no hole
    assert not kept("sdxl", HOLE)
    assert not kept("gpt-image-1", HOLE)
    body = {"model": "dall-e-2", "images": [{"image_url": HOLE_URL}], "size": "auto"}
    assert (image_of(edit(app, body))[outside] == PIXELS[outside]).all()
    broken = app.client.post(EDITS, data={**form, "model": "dall-e-2"}, files={"image": ("a.png", b"no image")})
    assert (broken.status_code, broken.json()["error"]["param"]) == (415, "image")


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_need_no_prompt(live_of: Callable[..., LiveServer]) -> None:
    """OpenAI's own client: n images like the one sent, each with its own seed."""
    live = live_of(FakeImageDenoiser())
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    answer = client.images.create_variation(image=("a.png", FILE), n=2, size="256x256", response_format="b64_json")
    images = [Image.open(io.BytesIO(base64.b64decode(datum.b64_json or ""))) for datum in answer.data or []]
    assert [image.size for image in images] == [(256, 256)] * 2
    assert len({datum.to_dict()["seed"] for datum in answer.data or []}) == 2
    assert {job.prompt for job in live.squares.finished} == {""}
    by_address = client.images.create_variation(image=("a.png", FILE), model="dall-e-2", extra_body={"seed": 5})
    (datum,) = by_address.data or []
    assert datum.url
    assert httpx.get(datum.url).status_code == 200
    client.close()


def test_variations_refuse_what_they_cannot_use(app: RunningApp) -> None:
    """No image, a mask, too many."""
    for body, param in (({}, "image"), ({"image": URL, "mask": URL}, "mask"), ({"image": URL, "n": 100}, "n")):
        answer = app.client.post(VARIATIONS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert app.squares.prepared == []


def test_an_edit_of_one_step_draws_it(app: RunningApp) -> None:
    """The default strength leaves less than a step of one, and so may a strength that is sent; one step is drawn."""
    for path in (EDITS, VARIATIONS):
        assert edit(app, {"image": URL, "num_inference_steps": 1}, path).status_code == 200
        assert edit(app, {"image": URL, "num_inference_steps": 1, "strength": 0.1}, path).status_code == 200
        assert app.squares.finished[-1].num_inference_steps == 1
