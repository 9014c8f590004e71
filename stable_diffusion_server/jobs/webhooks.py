"""Tells webhooks how jobs ended: signed, again and again until one is heard or a day is over, across restarts.

Headers and signature are those of Standard Webhooks (https://www.standardwebhooks.com): `webhook-id` is the job's,
`webhook-signature` is HMAC-SHA256 over `id.timestamp.body`. A receiver may hear a job's end more than once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Protocol

import structlog

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import JobStoreUnavailable, ServerError
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.outbox import webhook_host
from stable_diffusion_server.jobs.store.records import OutboxMessage
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore

_log = structlog.get_logger(__name__)

# Seconds to the next try, after the first, the second …; the last one is repeated.
WEBHOOK_BACKOFF = (5.0, 30.0, 120.0, 600.0, 3600.0)
MAX_TRIES = 28
_MAX_CONCURRENT, _MAX_PER_HOST = 16, 4
_ANY_NUMBER = 1_000_000_000
_POLL_SECONDS = 5.0
# Between two looks at the journal, so that a thousand quick answers are not a thousand looks.
_MIN_POLL_SECONDS = 0.02


class WebhookTransport(Protocol):
    """What reaches a webhook. Both raise `InvalidInput` for an address that may not be reached from here."""

    async def check(self, url: str, share: str = ...) -> None:
        """Nothing, if the address may be reached. `share` tells callers apart, who share the capacity."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = ...) -> int:
        """The status a message was answered with. Raises `RemoteFetchFailed`."""

    def close(self) -> None:
        """Let go of what it holds."""


class WebhookDispatcher:
    """Sends the journal's messages. `secret` signs them; without one they are not signed.

    What sends is shared out by the caller whose job it was, and of one caller's receivers each has a few places: one
    that keeps silent holds up neither other callers' messages nor those to other receivers.
    """

    def __init__(
        self, store: AsyncJobStore, transport: WebhookTransport, secret: str, webhook_backoff: tuple[float, ...]
    ) -> None:
        self._store = store
        self._transport = transport
        self._secret = secret
        self._backoff = webhook_backoff
        self._wake = asyncio.Event()
        self._caller_limiter = FairLimiter(_MAX_CONCURRENT)
        self._host_limiter = FairLimiter(_ANY_NUMBER, max_per_caller=_MAX_PER_HOST)
        self._sending: dict[str, asyncio.Task[None]] = {}
        # Waits last as long as they are meant to, whatever the clock is set to meanwhile.
        self._clock_offset = time.time() - time.monotonic()

    def wake(self) -> None:
        """There is a new message."""
        self._wake.set()

    async def run(self) -> None:
        """Send what is due, for ever."""
        try:
            while True:
                self._wake.clear()
                with suppress(JobStoreUnavailable):  # told by the journal
                    for message in await self._store(SqliteJobStore.due_messages, self._now(), self._backoff):
                        if message.job_id not in self._sending:
                            self._start(message)
                await asyncio.sleep(_MIN_POLL_SECONDS)
                with suppress(TimeoutError):  # time to look again
                    async with asyncio.timeout(min(_POLL_SECONDS, *self._backoff)):
                        await self._wake.wait()
        finally:
            for task in self._sending.values():
                task.cancel()

    def _now(self) -> float:
        return self._clock_offset + time.monotonic()

    def _start(self, message: OutboxMessage) -> None:
        task = self._sending[message.job_id] = asyncio.create_task(self._deliver(message))

        def ended(task: asyncio.Task[None]) -> None:
            del self._sending[message.job_id]
            self._wake.set()

        task.add_done_callback(ended)

    async def _deliver(self, message: OutboxMessage) -> None:
        """Send a message in its turn, and write down what came of it; while that cannot be written, none is sent."""
        async with (
            self._host_limiter.hold(f"{message.share} {webhook_host(message.url)}"),
            self._caller_limiter.hold(message.share),
        ):
            write = await self._send(message)
        while True:
            try:
                await write()
                return
            except JobStoreUnavailable:
                await asyncio.sleep(_POLL_SECONDS)

    async def _send(self, message: OutboxMessage) -> Callable[[], Awaitable[None]]:
        """Send a message; what is to be written down of it."""
        body, now = message.body.encode(), int(time.time())
        status = 0
        try:
            headers = sign_webhook(message.job_id, now, body, self._secret)
            status = await self._transport.post(message.url, body, headers, message.share)
            why = f"it answered {status}"
        except ServerError as error:
            why = error.detail
        except Exception as error:  # whatever it is, other messages are to be sent
            _log.error("unexpected error", job_id=message.job_id, exc_info=error)
            why = "an unexpected error"
        if status // 100 == HTTPStatus.OK // 100:
            return lambda: self._store(SqliteJobStore.delete_message, message)
        if status == HTTPStatus.GONE or message.tries + 1 >= MAX_TRIES:
            _log.warning("a webhook is given up", job_id=message.job_id, reason=why)
            return lambda: self._store(SqliteJobStore.delete_message, message)
        wait = self._backoff[min(message.tries, len(self._backoff) - 1)]
        _log.info("a webhook is tried again", job_id=message.job_id, reason=why, seconds=wait)
        due = self._now() + wait
        return lambda: self._store(SqliteJobStore.postpone, message, due)


def sign_webhook(job_id: str, timestamp: int, body: bytes, secret: str) -> dict[str, str]:
    """The headers of a message. A secret that begins with `whsec_` is base64 after that, as the standard has it."""
    headers = {
        "Content-Type": "application/json",
        "webhook-id": job_id,
        "webhook-timestamp": str(timestamp),
    }
    if secret:
        prefix = "whsec_"
        key = (
            base64.b64decode(secret.removeprefix(prefix), validate=True)
            if secret.startswith(prefix)
            else secret.encode()
        )
        content = f"{job_id}.{timestamp}.".encode() + body
        digest = hmac.new(key, content, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers
