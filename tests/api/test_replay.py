"""Reproducing an image from its embedded metadata: every task, every format, and every reason for refusal."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import RunningApp
from fakes import FakeImageDenoiser, disc, file_of

from stable_diffusion_server.generation.provenance import NOT_RECORDED
from stable_diffusion_server.imaging.encode import encode_image
from stable_diffusion_server.imaging.metadata import read_record
from stable_diffusion_server.types import Format, GenerationRequest

pytestmark = pytest.mark.slow

IMAGE = file_of(disc(96, 80))
_MASK = np.zeros((80, 96, 3), np.uint8)
_MASK[20:60, 30:70] = 255
MASK = file_of(_MASK)
FILES = {"image_file": IMAGE, "mask_file": MASK}
STYLE = ("/style_transfer_bytes_and_upload_image", {"image_file": IMAGE})
INPAINT = ("/inpaint_and_upload_image", FILES)
CREATE = ("/create_and_upload_image", {})


@pytest.fixture
def app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app with fake models that use their inputs."""
    return run_app(FakeImageDenoiser())


def made(running_app: RunningApp, route: tuple[str, dict[str, bytes]], **words: Any) -> bytes:
    """The file of an image generated on a route."""
    data = {"prompt": "a red square", **({"width": 64, "height": 64} if route is CREATE else {}), **words}
    answer = running_app.client.post(route[0], data=data, files=route[1] or None)
    assert answer.status_code == 200, answer.text
    return running_app.client.get(answer.json()["path"]).content


def replayed(
    running_app: RunningApp, picture: bytes, files: dict[str, bytes] | None = None, **words: Any
) -> httpx.Response:
    return running_app.client.post("/v1/replay", data=words, files={"picture_file": picture, **(files or {})})


@pytest.mark.parametrize("file_format", ["webp", "png", "jpeg"])
@pytest.mark.parametrize(
    ("route", "words"),
    [
        (CREATE, {"seed": 7, "width": 70, "height": 90, "guidance_scale": 3.5, "negative_prompt": "blur"}),
        (CREATE, {"seed": "random", "model": "flux", "num_inference_steps": 3}),
        (STYLE, {"strength": 0.5, "canny": "true", "canny_low": 30, "canny_high": 60, "control_scale": 0.9}),
        (INPAINT, {"feather": 5, "strength": 0.8, "refine": "false"}),
    ],
    ids=["text", "random seed", "style", "inpaint"],
)
def test_a_picture_is_drawn_again_bit_for_bit(
    app: RunningApp, route: tuple[str, dict[str, bytes]], words: dict[str, Any], file_format: str
) -> None:
    """The record and the source images are enough: same request, same digest, same pixels."""
    picture = made(app, route, format=file_format, **words)
    before = len(app.squares.finished)
    answer = replayed(app, picture, route[1])
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["replay"] == {"same_order": True, "equal": True, "decibels": None}
    assert (body["cached"], body["batched"]) == (False, False)
    assert len(app.squares.finished) == before + 1
    again = app.client.get(body["path"])
    assert again.headers["content-type"] == f"image/{file_format}"
    reported, retold = read_record(picture), read_record(again.content)
    assert reported is not None
    assert retold is not None
    assert {**reported, "alone": True} == {**retold, "alone": True}
    assert app.squares.finished[-1].alone


def test_it_is_drawn_again_each_time_and_stored_where_one_likes(app: RunningApp) -> None:
    """Below `replays/` by default, overwriting; a given name behaves like any other name."""
    picture = made(app, CREATE)
    bodies = [replayed(app, picture).json() for _ in range(2)]
    assert [body["cached"] for body in bodies] == [False, False]
    assert bodies[0]["key"].startswith("static/uploads/replays/")
    named = [replayed(app, picture, save_path="again.png", format="png", batch="any").json() for _ in range(2)]
    assert [body["cached"] for body in named] == [False, True]
    assert named[0]["replay"]["same_order"] is True
    assert named[0]["replay"]["decibels"] > 30, "a lossy file beside a lossless one"


def test_with_a_digest_alone_the_history_knows_the_rest(run_app: Callable[..., RunningApp]) -> None:
    """EMBED_METADATA=digest: found in the history, and refused where no history has it."""
    running_app = run_app(FakeImageDenoiser(), embed_metadata="digest")
    picture = made(running_app, CREATE)
    assert replayed(running_app, picture).json()["replay"]["same_order"] is True
    assert running_app.client.get("/history").status_code == 200  # forces pending history entries to be written
    with sqlite3.connect(running_app.folder / "data" / "history.db") as base:
        base.execute("DELETE FROM drawn")
    assert refused(replayed(running_app, picture)) == "picture_file"


def refused(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    return str(answer.json()["field"])


def test_the_sources_have_to_be_the_very_files(app: RunningApp) -> None:
    """Missing, different or extra: reported by name and digest, before anything is generated."""
    picture, before = made(app, INPAINT), len(app.squares.finished)
    other = file_of(disc(96, 80, "green", "white"))
    assert refused(replayed(app, picture)) == "image_file"
    assert refused(replayed(app, picture, {**FILES, "image_file": other})) == "image_file"
    assert refused(replayed(app, picture, {"image_file": IMAGE})) == "mask_file"
    assert refused(replayed(app, made(app, CREATE), {"image_file": IMAGE})) == "image_file"
    assert len(app.squares.finished) == before + 1


def forged(picture: bytes, **changes: Any) -> bytes:
    """An image with a falsified record."""
    record = read_record(picture) or {}
    asked = {**record["asked"], **changes.pop("asked", {})}  # type: ignore[dict-item]  # a mapping, as serialised
    return encode_image(disc(), Format.PNG, 100, {**record, "asked": asked, **changes})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"asked": {"prompt": 7}}, "picture_file"),
        ({"asked": {"prompt": None}}, "picture_file"),
        ({"asked": {"seed": "x"}}, "picture_file"),
        ({"asked": {"task": "theft"}}, "picture_file"),
        ({"asked": {"format": "exe"}}, "picture_file"),
        ({"asked": {"save_path": "../../etc/passwd"}}, "picture_file"),
        ({"asked": {"overwrite": True}}, "picture_file"),
        ({"asked": {"image": {"parameter": "x", "url": "http://169.254.169.254/"}}}, "picture_file"),
        ({"asked": {"loras": [["../../secret", 1.0]]}}, "picture_file"),
        ({"asked": {"loras": [["pastel", float("inf")]]}}, "picture_file"),  # no JSON, so no record
        ({"asked": {"width": 100_000}}, "width"),
        ({"asked": {"num_inference_steps": 10**9}}, "num_inference_steps"),
        ({"asked": {"guidance_scale": float("nan")}}, "picture_file"),
        ({"asked": {"guidance_scale": 1000.0}}, "guidance_scale"),
        ({"asked": {"loras": [["pastel", 1000.0]]}}, "lora"),
        ({"asked": {"prompt": "x" * 32_001}}, "prompt"),
        ({"asked": {"model": "dall-e"}}, "model"),
        ({"asked": {"scheduler": "x"}}, "scheduler"),
        ({"asked": {"task": "inpaint"}}, "picture_file"),
        ({"asked": {"width": None}}, "picture_file"),
        ({"asked": {"only_masked": -5}}, "picture_file"),
        ({"asked": []}, "picture_file"),
        ({"sources": "none"}, "picture_file"),
        ({"digest": "../x"}, "picture_file"),
        ({"digest": None}, "picture_file"),
    ],
)
def test_what_a_file_says_is_checked_as_at_any_endpoint(app: RunningApp, changes: dict[str, Any], field: str) -> None:
    """A forged record reaches no file, URL or number that a parameter could not."""
    picture, before = made(app, CREATE), len(app.squares.finished)
    if isinstance(changes.get("asked"), list):
        picture = encode_image(disc(), Format.PNG, 100, {**(read_record(picture) or {}), "asked": []})
    else:
        picture = forged(picture, **json.loads(json.dumps(changes)))
    answer = replayed(app, picture)
    assert refused(answer) == field
    assert len(app.squares.finished) == before


def test_another_order_is_reported(app: RunningApp) -> None:
    """A changed record is generated as it says, and not reported as identical."""
    body = replayed(app, forged(made(app, CREATE), asked={"prompt": "a blue square"})).json()
    assert body["replay"]["same_order"] is False
    assert body["replay"]["equal"] is False


@pytest.mark.parametrize("picture", [b"", b"no picture", IMAGE, file_of(disc(), "WEBP")])
def test_a_picture_that_says_nothing_is_refused(app: RunningApp, picture: bytes) -> None:
    """422 naming the field; so is a request without an image."""
    assert refused(replayed(app, picture)) == "picture_file"
    assert refused(app.client.post("/v1/replay", json={})) == "picture_file"


def test_every_field_of_a_request_is_recorded_or_known_not_to_matter(app: RunningApp) -> None:
    """Fails if a new request field is neither recorded nor listed as irrelevant."""
    record = read_record(made(app, CREATE)) or {}
    # Few requests have these, so they are recorded only where they are given.
    rare = {
        "extra",
        "sampling",
        "clip_skip",
        "prompt_2",
        "extend",
        "tiling",
        "mask_mode",
        "upscaler",
        "scale",
        "lora_parts",
        "hires_upscaler",
        "hires_scheduler",
        "hires_prompt",
        "hires_negative_prompt",
        "hires_scale",
        "hires_guidance",
        "hires_schedule",
        "hires_loras",
        "repairs",
        "controls",
    }
    assert {*record["asked"], *rare} == {part.name for part in fields(GenerationRequest)} - NOT_RECORDED  # type: ignore[call-overload]  # a mapping
