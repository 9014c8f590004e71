"""Requests of AUTOMATIC1111's API that are sent again: idempotency keys, and retries that join."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import RunningApp
from fakes import FakeDenoiser, file_of, joined_retry, until

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
SIZE = {"width": 64, "height": 64}
REUSED = "The idempotency key belongs to another request"


def post(running_app: RunningApp, headers: dict[str, str] | None = None, path: str = TXT2IMG, **change: Any) -> Any:
    """One request for images."""
    asked = {"prompt": "a red square", **SIZE, **change}
    return running_app.client.post(path, json=asked, headers=headers or {})


def seeds_of(answer: Any) -> list[int]:
    assert answer.status_code == 200, answer.text
    seeds: list[int] = json.loads(answer.json()["info"])["all_seeds"]
    return seeds


def picture(level: int) -> str:
    """A grey image in base64."""
    return base64.b64encode(file_of(np.full((64, 64, 3), level, np.uint8))).decode()


@pytest.mark.parametrize("more", [{}, {"seed": -1, "n_iter": 3}, {"batch_size": 2, "enable_hr": True, "hr_scale": 2}])
def test_a_key_repeats_the_answer(running_app: RunningApp, more: dict[str, Any]) -> None:
    """With the seeds that were drawn, although none was asked for; another request with the key is refused."""
    key = {"idempotency-key": "k"}
    first = post(running_app, key, **more)
    seeds, drawn = seeds_of(first), len(running_app.squares.finished)
    again = post(running_app, key, **more)
    assert seeds_of(again) == seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    assert again.json()["images"] == first.json()["images"]
    assert ("idempotency-replayed" in first.headers, again.headers["idempotency-replayed"]) == (False, "true")
    assert len(running_app.squares.finished) == drawn
    assert seeds_of(post(running_app, {"idempotency-key": "another"}, **more)) != seeds
    other = post(running_app, key, **{**more, "prompt": "a blue square"})
    assert (other.status_code, other.json()["error"]) == (422, REUSED)


def test_every_input_image_counts_for_a_key(running_app: RunningApp) -> None:
    """The second of two differs."""
    key = {"idempotency-key": "k"}
    images = [picture(level) for level in (10, 200, 90)]
    first = post(running_app, key, IMG2IMG, init_images=images[:2])
    assert seeds_of(post(running_app, key, IMG2IMG, init_images=images[:2])) == seeds_of(first)
    other = post(running_app, key, IMG2IMG, init_images=[images[0], images[2]])
    assert (other.status_code, other.json()["error"]) == (422, REUSED)


@pytest.mark.parametrize(
    "wrong", [{"width": 99_999}, {"steps": 0}, {"steps": "many"}, {"batch_size": 1000}, {"alwayson_scripts": 5}]
)
def test_a_key_is_not_spent_by_a_refusal(running_app: RunningApp, wrong: dict[str, Any]) -> None:
    """The corrected request is taken."""
    key = {"idempotency-key": "k"}
    assert 400 <= post(running_app, key, **wrong).status_code < 500
    assert len(seeds_of(post(running_app, key))) == 1


@pytest.mark.parametrize("key", ["", "a b", "ä", "k" * 256])
def test_a_key_that_is_none_is_refused(running_app: RunningApp, key: str) -> None:
    """As at the other endpoints."""
    answer = post(running_app, {"idempotency-key": key.encode("latin-1")})  # type: ignore[dict-item]  # not ASCII
    assert (answer.status_code, "Idempotency-Key" in answer.text) == (422, True)


def test_an_interrupted_request_does_not_spend_its_key(run_app: Callable[..., RunningApp]) -> None:
    """An unfinished picture is no answer to repeat; the next request with the key is drawn in full."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))
    gate, key, name = running_app.squares.gate, {"idempotency-key": "k"}, "task-0123456789abcdef"
    assert gate is not None
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, running_app, key, steps=9, force_task_id=name)
        until(lambda: bool(running_app.squares.batches))
        assert running_app.client.post(f"/sdapi/v1/interrupt?id_task={name}").status_code == 200
        gate.set()
        first.result(30)
    again = post(running_app, key, steps=9, force_task_id=name)
    assert (len(seeds_of(again)), "idempotency-replayed" in again.headers) == (1, False)
    assert post(running_app, key, steps=9, force_task_id=name).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("count", [1, 2])
def test_a_retry_joins_the_request_that_it_repeats(run_app: Callable[..., RunningApp], count: int) -> None:
    """By `x-stainless-retry-count`, while that request runs; another request, and a later retry, are new."""
    running_app = run_app(FakeDenoiser(gate=threading.Event()))

    def ask(retries: str) -> list[int]:
        return seeds_of(post(running_app, {"x-stainless-retry-count": retries}, n_iter=count))

    joined_retry(ask, running_app.squares, count)
