"""Unresponsive webhooks and changed clocks do not delay other messages; over real connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from service_harness import order

from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import JobPayload, JobRecord, JobState
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.webhooks import WebhookDispatcher
from stable_diffusion_server.net.url_policy import AllowedTarget
from stable_diffusion_server.net.webhook_client import WebhookClient
from stable_diffusion_server.types import Caller

pytestmark = pytest.mark.slow

HOST = "127.0.0.1"


@dataclass
class Listener:
    """Accepts connections; answers each request with a status, or never."""

    status: int | None = None
    heard: list[float] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        with suppress(asyncio.IncompleteReadError, OSError):  # the sender may have timed out
            await reader.readuntil(b"\r\n\r\n")
            self.heard.append(time.monotonic())
            if self.status is None:
                await reader.read()  # until the other side times out
            else:
                writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()


@asynccontextmanager
async def listening(listener: Listener) -> AsyncIterator[Listener]:
    """A listener on loopback."""
    server = await asyncio.start_server(listener.serve, HOST, listener.port)
    listener.port = server.sockets[0].getsockname()[1]
    yield listener
    server.close()


@dataclass
class Sending:
    """A store of ended jobs, and the dispatcher of their messages."""

    store: AsyncJobStore
    hooks: WebhookDispatcher

    async def ended(self, number: int, caller: str, url: str) -> None:
        """A job of a caller has ended, and its webhook is due."""
        entry = JobRecord(f"{caller}-{number}", Caller(caller), time.time(), webhook_url=url, share=f"key {caller}")
        await self.store.accept(entry, JobPayload(order()))
        await self.store.finish(replace(entry, state=JobState.DONE, ended_at=time.time()), "answered")
        self.hooks.wake()


Send = Callable[..., Any]


@asynccontextmanager
async def sending(folder: Path, *listeners: Listener, seconds: float = 30.0, **more: Any) -> AsyncIterator[Sending]:
    """Send to these listeners, with that many seconds to answer."""
    store = AsyncJobStore(SqliteJobStore(folder / "journal.db", 50_000_000))
    await store.open()
    poster = WebhookClient(seconds, [AllowedTarget.parse(f"{HOST}:{listener.port}") for listener in listeners])
    hooks = WebhookDispatcher(store, poster, more.get("secret", ""), more.get("webhook_backoff", (0.05,)))
    running = asyncio.create_task(hooks.run())
    yield Sending(store, hooks)
    running.cancel()
    await asyncio.wait([running], timeout=10)
    await store.close()
    poster.close()


async def until_heard(listener: Listener, count: int = 1) -> None:
    """Wait until a listener has received so many; the bound only ends a hanging test."""
    async with asyncio.timeout(240):
        while len(listener.heard) < count:  # noqa: ASYNC110  # a test's wait
            await asyncio.sleep(0.01)


@pytest.mark.fault(111)
async def test_silent_webhooks_of_one_caller_hold_up_nobody_elses(tmp_path: Path) -> None:
    """None of 64 messages has timed out when another caller's message arrives."""
    async with listening(Listener()) as silent, listening(Listener(204)) as good, sending(tmp_path, silent, good) as at:
        for number in range(64):
            await at.ended(number, "ann", f"http://{HOST}:{silent.port}/{number}")
        await until_heard(silent)
        await at.ended(0, "bob", f"http://{HOST}:{good.port}/")
        await until_heard(good)
        due = await at.store.due_messages(time.time(), (1.0,))
        assert all(message.tries == 0 for message in due)
        assert len(silent.heard) <= 8


@pytest.mark.fault(111)
async def test_a_receiver_that_keeps_silent_holds_up_no_other_of_the_same_caller(tmp_path: Path) -> None:
    """Without keys all are one caller: a dead receiver delays only its own messages."""
    async with listening(Listener()) as silent, listening(Listener(204)) as good, sending(tmp_path, silent, good) as at:
        for number in range(100):
            await at.ended(number, "", f"http://{HOST}:{silent.port}/{number}?at=/")
        await until_heard(silent)
        for number in range(100, 130):
            await at.ended(number, "", f"http://{HOST}:{good.port}/{number}")
        await until_heard(good, 30)
        assert len(silent.heard) <= 4


@pytest.mark.fault(111)
async def test_retries_of_one_callers_dead_webhooks_leave_places_for_others(tmp_path: Path) -> None:
    """While fifty time out again and again, another caller's ten arrive."""
    async with (
        listening(Listener()) as silent,
        listening(Listener(204)) as good,
        sending(tmp_path, silent, good, seconds=2.0) as at,
    ):
        for number in range(50):
            await at.ended(number, "ann", f"http://{HOST}:{silent.port}/")
        await until_heard(silent, 9)
        for number in range(10):
            await at.ended(number, "bob", f"http://{HOST}:{good.port}/")
        await until_heard(good, 10)


@pytest.mark.fault(113)
@pytest.mark.parametrize("step", [-7200.0, -60.0, 90_000.0], ids=["two hours back", "a minute back", "a day on"])
async def test_a_webhook_is_tried_again_in_its_time_although_the_clock_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """Delays use the monotonic clock."""
    async with listening(Listener(500)) as failing, sending(tmp_path, failing, webhook_backoff=(0.3,)) as at:
        await at.ended(0, "ann", f"http://{HOST}:{failing.port}/")
        await until_heard(failing)
        right = time.time
        monkeypatch.setattr(time, "time", lambda: right() + step)
        await at.ended(1, "ann", f"http://{HOST}:{failing.port}/")
        await until_heard(failing, 8)


@pytest.mark.fault(113)
async def test_what_was_postponed_by_a_clock_that_was_wrong_is_sent_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A due time further ahead than any retry delay is ignored."""
    right = time.time
    async with listening(Listener(500)) as failing, sending(tmp_path, failing, webhook_backoff=(0.3,)) as at:
        monkeypatch.setattr(time, "time", lambda: right() + 90_000)
        await at.ended(0, "ann", f"http://{HOST}:{failing.port}/")
        await until_heard(failing)
    monkeypatch.undo()
    failing.status = 204
    async with listening(failing), sending(tmp_path, failing, webhook_backoff=(0.3,)):
        await until_heard(failing, len(failing.heard) + 1)


async def test_an_error_no_one_thought_of_stops_no_other_message(tmp_path: Path) -> None:
    """A secret that cannot sign, or an unreadable URL, fails that message only."""
    async with listening(Listener(204)) as good, sending(tmp_path, good) as at:
        await at.ended(0, "ann", "http://[broken")
        await at.ended(1, "ann", "no address at all")
        await at.ended(2, "bob", f"http://{HOST}:{good.port}/")
        await until_heard(good)
