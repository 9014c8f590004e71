"""Job event streams: bounded in number, one preview encoding for all followers, no memory held for slow readers."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import Canvas, FakeDenoiser, disc, until
from live_servers import LiveServer

from stable_diffusion_server.api.base64_images import EncodedPreviews
from stable_diffusion_server.api.http_responses import EventResponse, FollowerLimiter
from stable_diffusion_server.errors import RateLimited
from stable_diffusion_server.jobs.events import JobEventLog, JobStatus
from stable_diffusion_server.jobs.store.records import JobState
from stable_diffusion_server.types import Format

pytestmark = pytest.mark.slow

KEYS = {"api_keys": "a:secret-of-a-1234567,b:secret-of-b-1234567"}
A, B = {"X-API-Key": "secret-of-a-1234567"}, {"X-API-Key": "secret-of-b-1234567"}
SQUARE = {"prompt": "a red square", "width": 64, "height": 64}


class Held(FakeDenoiser):
    """Backend that waits until the gate is opened, however long a busy machine takes until then."""

    def step(self, states: Sequence[Canvas]) -> None:
        assert self.gate is not None
        assert self.gate.wait(600)
        super().step(states)


def job_of(live: LiveServer, headers: dict[str, str], name: str) -> str:
    """Id of an accepted job that does not end while the gate is closed."""
    sent = httpx.post(
        f"{live.url}/create_and_upload_image",
        json={**SQUARE, "save_path": f"{name}.webp"},
        headers={**headers, "Prefer": "respond-async"},
    )
    assert sent.status_code == 202
    return str(sent.json()["id"])


@pytest.mark.fault(115)
def test_followers_are_bounded_by_job_by_caller_and_in_all(live_of: Callable[..., LiveServer]) -> None:
    """Excess followers get 429 with Retry-After; another caller still gets a slot; leaving frees one."""
    gate = threading.Event()
    live = live_of(Held(gate=gate), event_streams=16, event_streams_per_caller=6, event_streams_per_job=4, **KEYS)
    first, second, third, others = (
        job_of(live, headers, name) for headers, name in ((A, "one"), (A, "two"), (A, "three"), (B, "four"))
    )

    with ExitStack() as stack, httpx.Client(limits=httpx.Limits(max_connections=None), timeout=30) as client:

        def follow(job_id: str, headers: dict[str, str]) -> httpx.Response:
            answer = client.send(
                client.build_request("GET", f"{live.url}/jobs/{job_id}/events", headers=headers), stream=True
            )
            stack.callback(answer.close)
            return answer

        of_first = [follow(first, A) for _ in range(40)]
        assert Counter(answer.status_code for answer in of_first) == {200: 4, 429: 36}
        refused = next(answer for answer in of_first if answer.status_code == 429)
        assert refused.headers["retry-after"] == "5"
        assert Counter(follow(second, A).status_code for _ in range(4)) == {200: 2, 429: 2}
        assert follow(third, A).status_code == 429
        assert follow(others, B).status_code == 200
        next(answer for answer in of_first if answer.status_code == 200).close()
        until(lambda: follow(third, A).status_code == 200)
        gate.set()


@pytest.mark.fault(115)
def test_hundreds_of_followers_of_one_job_cost_the_others_nothing(live_of: Callable[..., LiveServer]) -> None:
    """The server keeps answering, every follower gets the end event, and all slots are free afterwards."""
    gate = threading.Event()
    live = live_of(Held(gate=gate))
    job_id = job_of(live, {}, "followed")

    client = httpx.Client(limits=httpx.Limits(max_connections=None), timeout=120)

    def follow(number: int) -> tuple[int, str]:
        answer = client.get(f"{live.url}/jobs/{job_id}/events")
        return answer.status_code, answer.text

    with client, ThreadPoolExecutor(64) as threads:
        following = [threads.submit(follow, number) for number in range(200)]
        until(lambda: sum(each.done() for each in following) >= 120, 120)
        assert client.get(f"{live.url}/healthz").status_code == 200
        gate.set()
        reported = [each.result() for each in following]
    counted = Counter(status for status, _ in reported)
    assert counted[429] >= 100
    assert 1 <= counted[200] <= 100
    assert all("event: done" in text for status, text in reported if status == 200)
    assert "event: done" in httpx.get(f"{live.url}/jobs/{job_id}/events", timeout=60).text


@pytest.mark.fault(115)
async def test_a_preview_is_encoded_once_for_all_who_follow_it() -> None:
    """Fifty at once and fifty later, in each format; a new preview is encoded once again; none is retained."""
    previews, pixels = EncodedPreviews(), disc()
    for _ in range(2):
        texts = await asyncio.gather(*(previews.text(pixels, Format.WEBP) for _ in range(50)))
        assert len(set(texts)) == 1
    await previews.text(pixels, Format.PNG)
    assert previews.encoded == 2
    assert await previews.text(np.zeros((8, 8, 3), np.uint8), Format.WEBP) != texts[0]
    gone = weakref.ref(pixels)
    del pixels
    gc.collect()
    assert gone() is None
    assert not previews._cache


@pytest.mark.fault(115)
async def test_a_follower_that_leaves_while_a_preview_is_encoded_takes_it_from_no_other() -> None:
    """The encoding continues for the other followers."""
    previews, pixels = EncodedPreviews(), np.zeros((2000, 2000, 3), np.uint8)
    leaving, staying = (asyncio.create_task(previews.text(pixels, Format.PNG)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert len(await asyncio.wait_for(staying, 60)) > 100
    assert previews.encoded == 1


@pytest.mark.fault(115)
async def test_a_slow_reader_holds_no_preview_that_was_superseded() -> None:
    """It continues with the latest preview, and earlier ones are freed."""
    happenings, standing = JobEventLog("e"), JobStatus("job", JobState.RUNNING, 0.0)
    following = happenings.follow(None, 10.0)
    happenings.add("step", standing)
    happening = await anext(following)
    assert happening is not None
    passed: list[weakref.ref[Any]] = []
    for _ in range(1000):
        pixels = np.zeros((64, 64, 3), np.uint8)
        passed.append(weakref.ref(pixels))
        happenings.add("preview", standing, pixels)
        del pixels
    assert sum(ref() is not None for ref in passed) == 1
    last = await anext(following)
    assert last is not None
    assert (last.id, last.kind) == ("e.1001", "preview")
    await following.aclose()
    assert happenings.readers == 0


async def endless() -> AsyncGenerator[bytes]:
    """Endless events."""
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0)


SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}


@pytest.mark.fault(115)
@pytest.mark.parametrize("version", ["2.0", "2.4"])
async def test_who_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """A connection that reads nothing until its timeout loses its slot."""
    monkeypatch.setattr("stable_diffusion_server.api.http_responses._SEND_TIMEOUT_SECONDS", 0.2)
    followers = FollowerLimiter(1, 1, 1)
    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent > 3:
            await asyncio.sleep(3600)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    response = EventResponse(endless(), followers, "job", "key a")
    scope = {**SCOPE, "asgi": {"spec_version": version}}
    async with asyncio.timeout(30):
        await response(scope, receive, send)
    with followers.follow("job", "key a"), pytest.raises(RateLimited), followers.follow("job", "key b"):
        pass
    with followers.follow("job", "key b"):
        pass


@pytest.mark.fault(115)
async def test_a_follower_who_is_gone_at_any_moment_is_counted_out() -> None:
    """Cancelled before the first event, during one, or while sending: its slot is freed."""
    followers = FollowerLimiter(1, 1, 1)

    async def send(message: Any) -> None:
        await asyncio.sleep(0.001)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    for turns in range(30):
        response = EventResponse(endless(), followers, "job", "key a")
        following = asyncio.create_task(response({**SCOPE, "asgi": {"spec_version": "2.4"}}, receive, send))
        for _ in range(turns):
            await asyncio.sleep(0)
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following
        with followers.follow("job", "key a"):
            pass
