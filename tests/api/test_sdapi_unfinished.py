"""Interrupt and skip of AUTOMATIC1111's API: the unfinished picture is answered, and nothing of it is kept."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from conftest import RunningApp
from fakes import Canvas, FakeDenoiser, FakePixels, until
from live_servers import LiveServer
from PIL import Image

pytestmark = pytest.mark.slow

SIZE = {"width": 64, "height": 64}
TXT2IMG = "/sdapi/v1/txt2img"


@dataclass
class Recording(FakeDenoiser):
    """Records at which steps it decoded, and can fail to decode what is unfinished."""

    spoilt: bool = False

    def __post_init__(self) -> None:
        self.decoded: list[tuple[int, int]] = []

    def finish(self, state: Canvas) -> FakePixels:
        self.decoded.append((state.index, state.steps))
        if self.spoilt and not state.done:
            raise RuntimeError("cannot decode this")
        return super().finish(state)


def post(live: LiveServer, path: str, asked: dict[str, Any] | None = None) -> Any:
    answer = httpx.post(f"{live.url}{path}", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def files_in(live: LiveServer) -> list[str]:
    return [path.name for path in (live.folder / "bucket").rglob("*") if path.is_file()]


@pytest.mark.parametrize("order", ["interrupt", "skip"])
def test_the_unfinished_picture_is_answered_and_kept_nowhere(live_of: Callable[..., LiveServer], order: str) -> None:
    """Decoded once, of the asked size; the same request afterwards is drawn in full, under its key."""
    squares = Recording(seconds_per_step=0.05)
    live = live_of(squares)
    asked = {"prompt": "a red square", "steps": 100, "seed": 7, **SIZE}
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(post, live, TXT2IMG, asked)
        until(lambda: len(squares.batches) > 2)
        post(live, f"/sdapi/v1/{order}")
        body = drawing.result(30)
    info = json.loads(body["info"])
    assert Image.open(io.BytesIO(base64.b64decode(body["images"][0]))).size == (64, 64)
    (decoded,) = squares.decoded
    assert 0 < decoded[0] < 100
    assert (info["interrupted"], info["keys"], info["paths"]) == (order == "interrupt", [], [])
    assert info["all_seeds"] == [7]
    assert "unfinished" in info["warnings"][0]
    assert files_in(live) == []
    squares.seconds_per_step = 0
    again = json.loads(post(live, TXT2IMG, asked)["info"])
    assert (again["cached"], len(files_in(live)) > 0) == ([False], True)
    assert squares.decoded[-1] == (100, 100)


def test_what_was_not_started_is_left_out_and_what_is_done_stays(live_of: Callable[..., LiveServer]) -> None:
    """Of requests in the queue there is nothing to show."""
    gate = threading.Event()
    squares = Recording(gate=gate)
    live = live_of(squares, max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(post, live, "/create_and_upload_image", {"prompt": "a blue square", **SIZE})
        until(lambda: len(squares.batches) > 0)
        drawing = pool.submit(post, live, TXT2IMG, {"prompt": "a red square", "seed": 7, **SIZE})
        until(lambda: httpx.get(f"{live.url}/sdapi/v1/progress").json()["state"]["job_count"] == 1)
        post(live, "/sdapi/v1/interrupt")
        body = drawing.result(30)
        gate.set()
        other.result(30)
    assert (body["images"], json.loads(body["info"])["interrupted"]) == ([], True)


def test_an_equal_request_of_another_goes_on(live_of: Callable[..., LiveServer]) -> None:
    """They share one generation: the interrupted caller gets the unfinished picture, the other the finished one."""
    squares = Recording(seconds_per_step=0.05)
    live = live_of(squares)
    order = {"prompt": "a red square", "seed": 7, "format": "png", "num_inference_steps": 40, **SIZE}
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(post, live, "/create_and_upload_image", order)
        until(lambda: len(squares.batches) > 0)
        drawing = pool.submit(post, live, TXT2IMG, {"prompt": "a red square", "seed": 7, "steps": 40, **SIZE})
        until(lambda: httpx.get(f"{live.url}/sdapi/v1/progress").json()["state"]["sampling_step"] > 0)
        post(live, "/sdapi/v1/interrupt")
        body = drawing.result(30)
        finished = other.result(30)
    assert len(body["images"]) == 1
    assert json.loads(body["info"])["keys"] == []
    assert finished["cached"] is False
    assert squares.decoded[-1] == (40, 40)
    assert len(squares.decoded) == 2


@pytest.mark.parametrize("order", ["interrupt", "skip"])
@pytest.mark.parametrize("whose", ["another key's", "the same key's"])
def test_an_order_leaves_an_equal_task_of_this_dialect_alone(
    live_of: Callable[..., LiveServer], order: str, whose: str
) -> None:
    """Both tasks share one generation, and only the one that was stopped ends unfinished."""
    squares = Recording(seconds_per_step=0.05)
    live = live_of(squares, api_keys="anna:secret-of-anna,ben:secret-of-ben")
    anna = {"X-API-Key": "secret-of-anna"}
    other = {"X-API-Key": "secret-of-ben"} if whose == "another key's" else anna
    stopped, kept = "task(stopped-stopped)", "task(kept-kept-kept)"

    def draw(headers: dict[str, str], name: str) -> Any:
        asked = {"prompt": "a red square", "seed": 7, "steps": 40, "force_task_id": name, **SIZE}
        answer = httpx.post(f"{live.url}{TXT2IMG}", json=asked, headers=headers, timeout=60)
        return json.loads(answer.json()["info"])

    def step_of(headers: dict[str, str], name: str) -> int:
        answer = httpx.get(f"{live.url}/sdapi/v1/progress", params={"id_task": name}, headers=headers)
        return int(answer.json()["state"]["sampling_step"])

    with ThreadPoolExecutor(2) as pool:
        drawing, finishing = pool.submit(draw, other, stopped), pool.submit(draw, anna, kept)
        until(lambda: step_of(other, stopped) > 0 and step_of(anna, kept) > 0)
        httpx.post(f"{live.url}/sdapi/v1/{order}", params={"id_task": stopped}, headers=other).raise_for_status()
        unfinished, finished = drawing.result(30), finishing.result(30)
    assert ("unfinished" in unfinished["warnings"][0], unfinished["keys"]) == (True, [])
    assert ("unfinished" in str(finished["warnings"]), len(finished["keys"]), finished["interrupted"]) == (
        False,
        1,
        False,
    )
    assert [batch for batch in squares.batches if len(batch) > 1] == []


def test_a_picture_that_cannot_be_decoded_yet_is_drawn_on(live_of: Callable[..., LiveServer]) -> None:
    """The failure is tried again after each step, and at the end the picture is finished."""
    squares = Recording(seconds_per_step=0.02, spoilt=True)
    live = live_of(squares)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(post, live, TXT2IMG, {"prompt": "a red square", "steps": 20, **SIZE})
        until(lambda: len(squares.batches) > 2)
        post(live, "/sdapi/v1/interrupt")
        body = drawing.result(30)
    assert len(body["images"]) == len(json.loads(body["info"])["keys"]) == 1


def test_nobody_who_does_not_ask_gets_an_unfinished_picture(run_app: Callable[..., RunningApp]) -> None:
    """Each request is decoded once, at its end."""
    squares = Recording()
    running = run_app(squares)
    running.client.post(TXT2IMG, json={"prompt": "a red square", "steps": 9, **SIZE})
    assert squares.decoded == [(9, 9)]
