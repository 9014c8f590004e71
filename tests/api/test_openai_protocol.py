"""Names, defaults, errors and repetitions at the OpenAI endpoints."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, FakeImageDenoiser, disc, file_of, joined_retry, until
from PIL import Image

from stable_diffusion_server.imaging import read_record

GENERATIONS, EDITS, CREATE = "/v1/images/generations", "/v1/images/edits", "/create_and_upload_image"
ASKED: dict[str, Any] = {"prompt": "a red square", "size": "64x64"}


def post(running_app: RunningApp, headers: dict[str, str] | None = None, **change: Any) -> Any:
    """One request for images."""
    return running_app.client.post(GENERATIONS, json={**ASKED, **change}, headers=headers or {})


def seeds_of(answer: Any) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [image["seed"] for image in answer.json()["data"]]


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("gpt-image-2", "b64_json"),
        ("gpt-image-2.6-sunburst-2026-05-01", "b64_json"),
        ("chatgpt-image-latest", "b64_json"),
        ("dall-e-2", "url"),
        ("dall-e-3-2023-11-06", "url"),
        ("sdxl", "url"),
        (None, "url"),
    ],
)
def test_a_name_that_starts_like_openais_is_the_default_model(
    running_app: RunningApp, model: str | None, field: str
) -> None:
    """Each has its own default of `response_format`; `response_format` overrides it; each can be retrieved."""
    (image,) = post(running_app, model=model).json()["data"]
    assert (image["model"], field in image) == ("sdxl", True)
    for wanted in ("url", "b64_json"):
        assert wanted in post(running_app, model=model, response_format=wanted).json()["data"][0]
    assert running_app.client.get(f"/v1/models/{model or 'sdxl'}").json()["id"] == (model or "sdxl")


def test_aliases_override_what_a_name_means_by_its_start(run_app: Callable[..., RunningApp]) -> None:
    """A new name still is the default model."""
    running_app = run_app(model_aliases="gpt-image-2=flux")
    assert post(running_app, model="gpt-image-2").json()["data"][0]["model"] == "flux"
    assert post(running_app, model="gpt-image-3").json()["data"][0]["model"] == "sdxl"


@pytest.mark.parametrize("name", ["nope", "gpt-7", "gpt-4o", "gpt-image", "stable-diffusion", "../sdxl"])
def test_an_unknown_model_is_not_found(running_app: RunningApp, name: str) -> None:
    """404 `model_not_found`, also for the model itself; at our own endpoints it stays 422."""
    for answer in (post(running_app, model=name), running_app.client.get(f"/v1/models/{name.strip('./')}x")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["type"] == "invalid_request_error"
    assert running_app.draw(prompt="a red square", model=name).status_code == 422


@pytest.mark.parametrize("wanted", ["url", "b64_json"])
def test_a_setting_says_what_an_answer_without_response_format_holds(
    run_app: Callable[..., RunningApp], wanted: str
) -> None:
    """OPENAI_RESPONSE_FORMAT is for every model and for edits."""
    running_app = run_app(FakeImageDenoiser(), openai_response_format=wanted)
    assert all(wanted in post(running_app, model=name).json()["data"][0] for name in ("sdxl", "gpt-image-1"))
    edited = running_app.client.post(EDITS, data=ASKED, files={"image": ("a.png", file_of(disc()))})
    assert wanted in edited.json()["data"][0]


@pytest.mark.parametrize("model", ["sdxl", "dall-e-2", "gpt-image-1"])
def test_an_edit_comes_in_base64(run_app: Callable[..., RunningApp], model: str) -> None:
    """Clients of edits expect it, whatever the model."""
    running_app = run_app(FakeImageDenoiser())
    files = {"image": ("a.png", file_of(disc()))}
    edited = running_app.client.post(EDITS, data={**ASKED, "model": model}, files=files)
    assert "b64_json" in edited.json()["data"][0]


def test_without_a_seed_each_image_is_new_and_our_own_endpoints_stay_the_same(running_app: RunningApp) -> None:
    """-1, null, `random` and nothing are alike; equal seeds give equal images."""
    answers = [post(running_app, **seed) for seed in ({}, {}, {"seed": -1}, {"seed": None}, {"seed": "random"})]
    assert len({seeds_of(answer)[0] for answer in answers}) == 5
    assert len({answer.json()["data"][0]["url"] for answer in answers}) == 5
    assert seeds_of(post(running_app, seed=5, n=3)) == [5, 6, 7]
    own = [running_app.draw(prompt="a red square").json() for _ in range(2)]
    assert (own[0]["path"], own[1]["cached"]) == (own[1]["path"], True)


def test_ten_images_in_one_answer(running_app: RunningApp) -> None:
    """OpenAI's bound, each with a seed of its own."""
    assert len(set(seeds_of(post(running_app, n=10)))) == 10
    assert "between 1 and 10" in post(running_app, n=11).json()["error"]["message"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_retry_joins_the_request_that_it_repeats(run_app: Callable[..., RunningApp], count: int) -> None:
    """By `x-stainless-retry-count`, while that request runs; another request, and a later retry, are new."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))

    def ask(retries: str) -> list[int]:
        return seeds_of(post(running_app, {"x-stainless-retry-count": retries}, n=count))

    joined_retry(ask, running_app.squares, count)


def test_a_request_with_a_key_in_use_waits_for_its_answer(run_app: Callable[..., RunningApp]) -> None:
    """The same answer for both, drawn once."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))
    gate, key = running_app.squares.gate, {"idempotency-key": "k"}
    assert gate is not None
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, running_app, key)
        until(lambda: bool(running_app.squares.batches))
        again = pool.submit(post, running_app, key)
        threading.Event().wait(0.3)
        gate.set()
        assert seeds_of(first.result(30)) == seeds_of(again.result(30))
    assert again.result().headers["idempotency-replayed"] == "true"
    assert len(running_app.squares.finished) == 1


@pytest.mark.parametrize("more", [{"n": 3}, {"n": 2, "response_format": "b64_json"}, {"stream": True}])
def test_a_key_repeats_several_images_and_streams(running_app: RunningApp, more: dict[str, Any]) -> None:
    """Drawn once; another number of images with the key is another request."""
    key = {"idempotency-key": "k"}
    first, again = (post(running_app, key, **more) for _ in range(2))
    count = more.get("n", 1)
    assert len(running_app.squares.finished) == count
    if "stream" in more:
        events = [json.loads(line[6:]) for line in again.text.splitlines() if line.startswith("data:")]
        assert [event["type"] for event in events] == ["image_generation.completed"]
        assert str(events[0]["seed"]) in first.text
    else:
        assert again.json()["data"] == first.json()["data"]
        assert again.headers["idempotency-replayed"] == "true"
    other = post(running_app, key, n=count + 1)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_key_is_not_spent_by_a_refusal(running_app: RunningApp) -> None:
    """The corrected request is taken, at OpenAI's endpoints and at our own; 4xx of any stage."""
    for number, wrong in enumerate([{"size": "9x9"}, {"model": "nope"}, {"scheduler": "warp"}, {"lora": "nothing"}]):
        key = {"idempotency-key": f"k{number}"}
        assert 400 <= post(running_app, key, **wrong).status_code < 500
        assert post(running_app, key).status_code == 200
    own = {"prompt": "x", "width": 64, "height": 64}
    for number, change in enumerate([{"width": 9999}, {"scheduler": "warp"}, {"lora": "nothing"}]):
        key = {"idempotency-key": f"own{number}"}
        assert running_app.client.post("/make_image", json={**own, **change}, headers=key).status_code == 422
        assert running_app.client.post("/make_image", json=own, headers=key).status_code == 200


TAKEN: dict[str, Any] = {
    "background": "transparent", "moderation": "low", "style": "vivid", "input_fidelity": "high", "complexity": "high",
    "effort": "low", "reasoning": {"effort": "low"}, "svg": {"a": [1]}, "frame_count": 1, "frame_duration_ms": 40,
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_openai_has_and_this_server_has_not_is_taken_with_a_warning(running_app: RunningApp, name: str) -> None:
    """The image comes, opaque; the warning names the parameter."""
    body = post(running_app, **{name: TAKEN[name]}).json()
    sentences = [warning["message"] for warning in body["warnings"] if warning["code"] == "not-honoured"]
    assert len(sentences) == 1
    assert sentences[0].startswith(f"{name}: ")
    assert body["background"] == "opaque"


def test_values_that_change_nothing_are_taken_without_a_warning(running_app: RunningApp) -> None:
    """As clients that send every field do."""
    every = {
        "background": "opaque", "output_compression": 100, "output_format": "png", "partial_images": 0, "stream": False,
        "user": "me", "safety_identifier": "me", "quality": "auto", "n": 1,
    }  # fmt: skip
    body = post(running_app, **every).json()
    assert "not-honoured" not in {warning["code"] for warning in body["warnings"]}


@pytest.mark.parametrize("format_", ["gif", "svg", "bmp"])
def test_an_unknown_output_format_is_refused_with_those_there_are(running_app: RunningApp, format_: str) -> None:
    """400, and the message lists the formats."""
    answer = post(running_app, output_format=format_)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "output_format must be 'webp', 'png' or 'jpeg'."


@pytest.mark.parametrize(
    "names",
    [
        {"steps": 2, "cfg_scale": 5},
        {"num_steps": 2, "true_cfg_scale": 5.0},
        {"sample_steps": 2, "guidance": 5},
        {"num_inference_steps": 2, "guidance_scale": 5, "steps": 2},
    ],
)
def test_other_servers_names_are_taken(running_app: RunningApp, names: dict[str, Any]) -> None:
    """Steps and guidance, sampler, and width and height for the size."""
    asked = {"prompt": "a red square", "width": 128, "height": 64, "sampler_name": "ddim", **names}
    answer = running_app.client.post(GENERATIONS, json=asked)
    assert answer.json()["size"] == "128x64"
    (job,) = running_app.squares.finished
    assert (job.num_inference_steps, job.guidance_scale, job.scheduler) == (2, 5.0, "ddim")


@pytest.mark.parametrize(
    ("change", "params"),
    [
        ({"steps": 1000, "cfg_scale": 500, "foo": 1}, ["foo", "steps", "cfg_scale"]),
        ({"steps": 2, "num_inference_steps": 3}, ["num_inference_steps"]),
        ({"width": 128}, ["size"]),
        ({"a": 1, "b": 2, "c": 3, "n": 99, "size": "1x1", "model": "nope"}, ["a", "b", "c", "n", "size", "model"]),
        ({"n": "3", "seed": True, "refine": 1, "quality": "x"}, ["n", "seed", "refine", "quality"]),
        ({"prompt": None, "n": 99}, ["prompt", "n"]),
        ({"prompt": ["a"], "seed": 2**64, "scheduler": "warp"}, ["prompt", "seed", "scheduler"]),
    ],
)
def test_one_message_names_everything_that_is_wrong(
    running_app: RunningApp, change: dict[str, Any], params: list[str]
) -> None:
    """By the names that were sent, whichever check finds it."""
    error = post(running_app, **change).json()["error"]
    assert error["code"] == "invalid_value"
    assert all(name in error["message"] for name in params), error["message"]
    assert "more)" not in error["message"]


@pytest.mark.parametrize("path", [GENERATIONS, CREATE, "/sdapi/v1/txt2img"])
def test_numbers_in_messages_are_written_out(running_app: RunningApp, path: str) -> None:
    """Not as 4.29497e+09."""
    wrong = {"prompt": "x", "seed": -2, "width": 10**9, "height": 10**9}
    answer = running_app.client.post(path, json=wrong)
    assert answer.status_code in (400, 422)
    assert "e+" not in answer.text
    if path != "/sdapi/v1/txt2img":
        assert "seed must be between 0 and 18446744073709551615." in answer.text


def test_our_own_endpoints_name_every_fault_in_plain_words(running_app: RunningApp) -> None:
    """Unknown names, types and bounds in one `detail`, and one by one in `errors`."""
    wrong = {"prompt": 5, "foo": 1, "bar": 2, "seed": "x", "width": 1.5, "num_inference_steps": 1000}
    body = running_app.client.post(CREATE, json=wrong).json()
    assert {error["field"] for error in body["errors"]} == set(wrong)
    assert all(error["detail"] in body["detail"] for error in body["errors"])
    assert "input should" not in body["detail"]


@pytest.mark.parametrize("form", [{"image": "abc"}, {"image[]": "abc"}, {}])
def test_an_image_that_is_no_file_is_refused_in_plain_words(running_app: RunningApp, form: dict[str, str]) -> None:
    """400 for the image, with what to do."""
    answer = running_app.client.post(EDITS, data={"prompt": "x", **form})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")
    assert "image must be sent as a file of a multipart form" in answer.json()["error"]["message"]


OPTIONAL = [
    "n", "size", "response_format", "output_format", "output_compression", "background", "quality", "stream",
    "partial_images", "moderation", "user", "style", "save_path", "model", "negative_prompt", "seed", "lora", "timeout",
    "num_inference_steps", "guidance_scale", "scheduler", "overwrite", "refine", "batch", "width", "height", "steps",
]  # fmt: skip


def test_null_is_as_if_left_out(running_app: RunningApp) -> None:
    """For every optional parameter, at OpenAI's endpoint and at our own; a null prompt is a missing one."""
    answer = running_app.client.post(GENERATIONS, json={**dict.fromkeys(OPTIONAL), **ASKED})
    assert answer.status_code == 200, answer.text
    schema = running_app.client.get("/openapi.json").json()["paths"]
    for path in (CREATE, "/style_transfer_and_upload_image", "/inpaint_and_upload_image"):
        content = schema[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        nulls = dict.fromkeys(set(content["properties"]) - {"prompt"})
        errors = running_app.client.post(path, json={"prompt": "a red square", **nulls}).json().get("errors", [])
        assert {error["field"] for error in errors} <= {"image_url", "image_file", "mask_url", "mask_file"}
    assert "prompt is missing" in running_app.client.post(CREATE, json={"prompt": None}).text


@pytest.mark.parametrize("size", ["١٢٨x١٢٨", "１２８x１２８", "128×128", "128X128", " 128x128", "128x", "x", "1e2x64"])
def test_a_size_has_ascii_digits(running_app: RunningApp, size: str) -> None:
    """Digits of other scripts are digits to Python too."""
    answer = post(running_app, size=size)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size")


@pytest.mark.parametrize("path", [GENERATIONS, CREATE, "/sdapi/v1/txt2img"])
@pytest.mark.parametrize("shape", ["word ", "a", "\U0001f469", "\u732b"])
def test_prompts_have_up_to_32000_characters(running_app: RunningApp, path: str, shape: str) -> None:
    """Escaped or not; what the encoder cuts is a warning; one character more is refused."""
    text = (shape * 32_000)[:31_999] + "."
    size = {"size": "64x64"} if path == GENERATIONS else {"width": 64, "height": 64}
    for ascii_only in (True, False):
        body = json.dumps({"prompt": text, "negative_prompt": text, **size}, ensure_ascii=ascii_only).encode()
        answer = running_app.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text[:300]
    if path == GENERATIONS and shape == "word ":
        assert "prompt-shortened" in {warning["code"] for warning in answer.json()["warnings"]}
    more = {"prompt": text + "." * (1 if path != "/sdapi/v1/txt2img" else 10_000), **size}
    assert running_app.client.post(path, json=more).status_code in (400, 422)


def test_a_jpeg_with_a_long_prompt_holds_the_digest_of_its_record(running_app: RunningApp) -> None:
    """A segment of a JPEG has 64 KiB; a WebP holds the whole record."""
    asked = {"prompt": "word " * 6000, "negative_prompt": "a " * 16_000, "width": 64, "height": 64}
    records = []
    for format_ in ("jpeg", "webp"):
        answer = running_app.client.post("/make_image", json={**asked, "format": format_})
        assert Image.open(io.BytesIO(answer.content)).format == format_.upper()
        records.append(read_record(answer.content) or {})
    assert set(records[0]) == {"digest"}
    assert len(str(records[1]["asked"])) > 30_000
