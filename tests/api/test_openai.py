"""The OpenAI Images API, called with OpenAI's own client."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from conftest import RunningApp
from fakes import COLOURS, Canvas, FakeDenoiser, FakeImageDenoiser, disc, file_of, until
from live_servers import LiveServer
from numpy.typing import NDArray
from PIL import Image

pytestmark = pytest.mark.slow

SIZE = "64x64"


def client_of(live: LiveServer, **more: Any) -> openai.OpenAI:
    closing = {"Connection": "close"}  # no socket outlives its test
    key = more.pop("api_key", "none")
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, default_headers=closing, **more)


@pytest.fixture
def client(live_of: Callable[..., LiveServer]) -> openai.OpenAI:
    """OpenAI's client against a server with fake image-to-image models."""
    return client_of(live_of(FakeImageDenoiser()))


def picture(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_picture_comes_by_its_address(client: openai.OpenAI) -> None:
    """`dall-e-3` is an alias of the server's default model; the URL works, and the file is as requested."""
    answer = client.images.generate(model="dall-e-3", prompt="a red square", size=SIZE)
    (datum,) = answer.data or []
    assert datum.url is not None
    assert datum.b64_json is None
    opened = Image.open(io.BytesIO(httpx.get(datum.url).content))
    assert (opened.size, opened.format) == ((64, 64), "PNG")
    assert answer.size == SIZE


@pytest.mark.parametrize("file_format", ["png", "webp", "jpeg"])
def test_a_picture_comes_in_base64(client: openai.OpenAI, file_format: Any) -> None:
    """On request, and by default for model names that always return base64."""
    said = client.images.generate(
        prompt="a red square", size=SIZE, response_format="b64_json", output_format=file_format
    )
    unsaid = client.images.generate(model="gpt-image-1", prompt="a red square", size=SIZE, output_format=file_format)
    for answer in (said, unsaid):
        assert picture((answer.data or [])[0].b64_json).format == file_format.upper()
        assert answer.output_format == file_format


def test_several_pictures_differ_and_without_a_seed_are_new_each_time(client: openai.OpenAI) -> None:
    """`n=2` gives two images with two seeds, and two others the next time; with `seed`, image i uses seed + i."""
    first, again = (client.images.generate(prompt="a red square", size=SIZE, n=2).data or [] for _ in range(2))
    assert len({datum.url for datum in [*first, *again]}) == 4
    assert len({datum.to_dict()["seed"] for datum in [*first, *again]}) == 4
    seeded = client.images.generate(prompt="a red square", size=SIZE, n=2, extra_body={"seed": 41}).data or []
    assert [datum.to_dict()["seed"] for datum in seeded] == [41, 42]


def test_our_parameters_go_in_extra_body(live_of: Callable[..., LiveServer]) -> None:
    """Seed, steps, guidance, scheduler, name: what the other routes accept."""
    live = live_of()
    extra = {"seed": 3, "num_inference_steps": 5, "guidance_scale": 1.5, "scheduler": "ddim", "save_path": "o/a.webp"}
    answer = client_of(live).images.generate(prompt="a red square", size=SIZE, extra_body=extra)
    assert (answer.data or [])[0].to_dict()["key"] == "static/uploads/o/a.webp"
    (job,) = live.squares.finished
    assert (job.seed, job.num_inference_steps, job.guidance_scale, job.scheduler) == (3, 5, 1.5, "ddim")


@pytest.mark.parametrize(("quality", "steps"), [("low", 2), ("medium", 4), ("auto", 4), ("hd", 8), ("max", 16)])
def test_quality_is_steps(live_of: Callable[..., LiveServer], quality: Any, steps: int) -> None:
    """Half, once, twice, four times the model's default."""
    live = live_of()
    client_of(live).images.generate(prompt="a red square", size=SIZE, quality=quality)
    assert live.squares.finished[0].num_inference_steps == steps


def test_auto_is_the_servers_size_and_what_cannot_be_honoured_is_reported(client: openai.OpenAI) -> None:
    """1024 × 1024; styles belong in the prompt, and the response warns of that."""
    answer = client.images.generate(prompt="a red square", size="auto", style="vivid", user="me", moderation="low")
    assert answer.size == "1024x1024"
    assert "not-honoured" in {warning["code"] for warning in answer.to_dict()["warnings"]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 11}, "n"),
    ({"n": 0}, "n"),
    ({"size": "64"}, "size"),
    ({"size": "32x64"}, "size"),
    ({"size": "64x4096"}, "size"),
    ({"background": "white"}, "background"),
    ({"quality": "lossy"}, "quality"),
    ({"output_format": "svg"}, "output_format"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 50}, "output_compression"),
    ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
    ({"partial_images": 2}, "partial_images"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"response_format": "file"}, "response_format"),
    ({"prompt": ""}, "prompt"),
    ({"extra_body": {"seed": -2}}, "seed"),
    ({"extra_body": {"sede": 1}}, "sede"),
    ({"extra_body": {"save_path": "../a"}}, "save_path"),
    ({"extra_body": {"save_path": "a.png"}, "n": 2}, "save_path"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_refused_in_openais_shape(running_app: RunningApp, change: dict[str, Any], param: str) -> None:
    """400 with message, type, param and code, before anything is generated, streamed or not."""
    extra = change.get("extra_body", {})
    body = {"prompt": "a red square", "size": SIZE, **change, **extra}
    body.pop("extra_body", None)
    answer = running_app.client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_value")
    assert error["message"]
    assert running_app.squares.prepared == []


def test_the_client_understands_a_refusal(client: openai.OpenAI) -> None:
    """It raises its own exception, with code and param."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a red square", size="huge")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "size")


def test_a_wrong_key_and_a_rate_are_what_the_client_expects(live_of: Callable[..., LiveServer]) -> None:
    """401 with `invalid_api_key`; 429 with `rate_limit_exceeded`, and the client's own retry waits for Retry-After."""
    live = live_of(api_keys="right;rate=1/second")
    with pytest.raises(openai.AuthenticationError) as wrong:
        client_of(live, api_key="wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    client = client_of(live, api_key="right")
    client.images.generate(prompt="a red square", size=SIZE)
    with pytest.raises(openai.RateLimitError) as refused:
        client.images.generate(prompt="a red square", size=SIZE)
    assert refused.value.code == "rate_limit_exceeded"
    started = time.monotonic()
    patient = client.with_options(max_retries=2)
    assert patient.images.generate(prompt="a red square", size=SIZE).data
    assert time.monotonic() - started < 30


def test_models_are_listed_with_their_further_names(client: openai.OpenAI) -> None:
    """Our models and their aliases; an unknown one is 404."""
    names = {model.id for model in client.models.list()}
    assert names >= {"sdxl", "flux", "dall-e-3", "gpt-image-1"}
    assert client.models.retrieve("dall-e-3").id == "dall-e-3"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-7")


def test_an_edit_repaints_what_the_mask_leaves_transparent(live_of: Callable[..., LiveServer]) -> None:
    """Green inside the hole; outside, every pixel equals the input."""
    live = live_of(FakeImageDenoiser())
    pixels = disc(96, 80)
    alpha = np.full((80, 96, 4), 255, np.uint8)
    alpha[20:60, 30:70, 3] = 0
    answer = client_of(live).images.edit(
        image=("a.png", file_of(pixels)), mask=("m.png", file_of(alpha)), prompt="a green square",
        response_format="b64_json", size="auto",
    )  # fmt: skip
    result = np.asarray(picture((answer.data or [])[0].b64_json).convert("RGB"))
    outside = alpha[..., 3] == 255
    assert (result[outside] == pixels[outside]).all()
    assert np.abs(result[25:55, 35:65].astype(int) - COLOURS["green"]).max() <= 16
    assert live.squares.finished[0].refine


def test_an_edit_without_a_mask_redraws_at_the_size_asked_for(live_of: Callable[..., LiveServer]) -> None:
    """With the default strength of style transfer; of several images it uses the first, and warns."""
    live = live_of(FakeImageDenoiser())
    files = [("a.png", file_of(disc())), ("b.png", file_of(disc(64, 64)))]
    answer = client_of(live).images.edit(image=files, prompt="a green square", size="128x64", n=2)
    assert answer.size == "128x64"
    assert len({datum.b64_json for datum in answer.data or []} - {None}) == 2
    assert "images-unused" in {warning["code"] for warning in answer.to_dict()["warnings"]}
    assert {job.strength for job in live.squares.finished} == {0.6}


def test_an_edit_without_a_picture_or_with_an_opaque_mask_is_refused(run_app: Callable[..., RunningApp]) -> None:
    """By field name: there is nothing to edit, or nothing to repaint."""
    running_app = run_app(FakeImageDenoiser())
    files = {"image": ("a.png", file_of(disc())), "mask": ("m.png", file_of(disc()))}
    opaque = running_app.client.post("/v1/images/edits", data={"prompt": "a red square"}, files=files)
    assert (opaque.status_code, opaque.json()["error"]["param"]) == (400, "mask")
    assert "transparent" in opaque.json()["error"]["message"]
    none = running_app.client.post("/v1/images/edits", data={"prompt": "a red square"})
    assert (none.status_code, none.json()["error"]["param"]) == (400, "image")


def test_a_stream_ends_with_the_picture(live_of: Callable[..., LiveServer]) -> None:
    """Each of the `n` images has its own event, in base64, with the bytes of the stored file."""
    live = live_of()
    stream = client_of(live).images.generate(prompt="a red square", size=SIZE, n=2, stream=True)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event in events:
        assert picture(event.b64_json).size == (64, 64)
        assert httpx.get(event.to_dict()["url"]).content == base64.b64decode(event.b64_json)


def test_a_single_picture_may_be_a_job_and_is_answered_once_for_its_key(running_app: RunningApp) -> None:
    """`Prefer: respond-async` gives 202 with the job; a repeated Idempotency-Key gives the same response."""
    asked = {"prompt": "a red square", "size": SIZE}
    job = running_app.client.post("/v1/images/generations", json=asked, headers={"prefer": "respond-async"})
    assert job.status_code == 202
    until(lambda: running_app.client.get(job.headers["location"]).json()["state"] == "done")
    mine = {"idempotency-key": "mine"}
    first, again = (
        running_app.client.post("/v1/images/generations", json={**asked, "seed": "random"}, headers=mine)
        for _ in range(2)
    )
    assert first.json()["data"] == [{**again.json()["data"][0], "cached": first.json()["data"][0]["cached"]}]
    assert again.headers["idempotency-replayed"] == "true"
    assert len(running_app.squares.finished) == 2


class Sketching(FakeDenoiser):
    """Backend that reports progress: a grey equal to the number of steps done."""

    def preview(self, state: Canvas) -> NDArray[np.uint8]:
        return np.full((8, 8, 3), state.index, np.uint8)


@pytest.mark.parametrize("wanted", [0, 1, 3])
def test_a_stream_shows_the_picture_on_its_way(live_of: Callable[..., LiveServer], wanted: int) -> None:
    """As many partial images as requested, numbered, in order, and then the final one."""
    live = live_of(Sketching(seconds_per_step=0.01))
    stream = client_of(live).images.generate(
        prompt="a red square", size=SIZE, stream=True, partial_images=wanted, extra_body={"num_inference_steps": 24}
    )
    events = list(stream)
    kinds = ["image_generation.partial_image"] * wanted + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    partials = [event.to_dict() for event in events[:-1]]
    assert [event["partial_image_index"] for event in partials] == list(range(wanted))
    steps = [np.asarray(picture(event["b64_json"])).max() for event in partials]
    assert steps == sorted(set(steps))


def test_a_stream_that_fails_tells_it_in_an_event(live_of: Callable[..., LiveServer]) -> None:
    """After the stream began there is no status code left to use; before, there is."""
    live = live_of()
    with pytest.raises(openai.APIError, match="error"):
        list(client_of(live).images.generate(prompt="an unsteppable square", size=SIZE, stream=True))
    with pytest.raises(openai.BadRequestError):
        client_of(live).images.generate(prompt="", size=SIZE, stream=True)


def test_who_stops_reading_a_stream_frees_the_device(live_of: Callable[..., LiveServer]) -> None:
    """The job is cancelled within a step."""
    squares = FakeDenoiser(seconds_per_step=0.05)
    live = live_of(squares)
    stream = client_of(live).images.generate(
        prompt="a red square", size=SIZE, stream=True, extra_body={"num_inference_steps": 100}
    )
    until(lambda: len(squares.batches) > 1)
    stream.response.close()
    until(lambda: "sds_queue_running 0.0" in httpx.get(f"{live.url}/metrics").text)
    assert squares.finished == []


def test_a_failure_of_one_picture_ends_the_others(run_app: Callable[..., RunningApp]) -> None:
    """429 for the whole request: no partial response, and the device is free."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(squares, queue_limit=1, max_batch=1)
    answer = running_app.client.post("/v1/images/generations", json={"prompt": "a red square", "size": SIZE, "n": 4})
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    squares.gate.set()
    until(lambda: running_app.metric("sds_queue_running") == 0)


def test_an_answer_that_would_be_too_large_is_refused_beforehand(run_app: Callable[..., RunningApp]) -> None:
    """MAX_RESPONSE_BYTES: as base64 it is 400, by URL it is generated."""
    running_app = run_app(max_response_bytes=40_000)
    asked = {"prompt": "a red square", "size": "64x64", "response_format": "b64_json"}
    for n, status in ((2, 200), (3, 400)):
        assert running_app.client.post("/v1/images/generations", json={**asked, "n": n}).status_code == status
    by_url = {**asked, "n": 3, "response_format": "url"}
    assert running_app.client.post("/v1/images/generations", json=by_url).status_code == 200
