"""Webhook dispatcher: reports the end of each job, signed, with retries for about a day, also after a restart.

Headers and signature follow Standard Webhooks (https://www.standardwebhooks.com): `webhook-id` is the job's id, with
`.start` for a message about its start, which some dialects have. `webhook-signature` is HMAC-SHA256 over
`id.timestamp.body`. Delivery is at least once.
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

_log = structlog.get_logger(__name__)

MAX_TRIES = 28
_MAX_CONCURRENT, _MAX_PER_HOST = 16, 4
_UNLIMITED = 1_000_000_000
_POLL_SECONDS = 5.0
# Minimum pause between two queries of the outbox, so that 1,000 quick responses do not cause 1,000 queries.
_MIN_POLL_SECONDS = 0.02


class WebhookTransport(Protocol):
    """Sends webhook messages. `check` and `post` raise `InvalidInput` for an address the server must not contact."""

    async def check(self, url: str, share: str = ...) -> None:
        """Raise if the server must not contact the address. `share` names the caller for fair sharing of capacity."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = ...) -> int:
        """Send a message and return the HTTP status. Raises `RemoteFetchFailed`."""

    def close(self) -> None:
        """Release connections."""


class WebhookDispatcher:
    """Sends the messages of the outbox. `secret` signs them; with an empty secret they are unsigned.

    Callers share the capacity fairly, and each host of a caller gets a few slots, so that one silent receiver delays
    neither other callers nor other receivers.
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
        self._host_limiter = FairLimiter(_UNLIMITED, max_per_caller=_MAX_PER_HOST)
        self._sending: dict[str, asyncio.Task[None]] = {}
        # Time is monotonic time plus this offset, so that a clock change neither shortens nor extends a wait.
        self._clock_offset = time.time() - time.monotonic()

    def wake(self) -> None:
        """Query the outbox now."""
        self._wake.set()

    async def run(self) -> None:
        """Send due messages until cancelled."""
        try:
            while True:
                self._wake.clear()
                with suppress(JobStoreUnavailable):  # logged by the store
                    for message in await self._store.due_messages(self._now(), self._backoff):
                        if message.job_id not in self._sending:
                            self._start(message)
                await asyncio.sleep(_MIN_POLL_SECONDS)
                with suppress(TimeoutError):  # poll
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
        """Send a message once and store the result; retry only the store, so that the message is not sent twice."""
        async with (
            self._host_limiter.hold(f"{message.share} {webhook_host(message.url)}"),
            self._caller_limiter.hold(message.share),
        ):
            store_result = await self._send(message)
        while True:
            try:
                await store_result()
                return
            except JobStoreUnavailable:
                await asyncio.sleep(_POLL_SECONDS)

    async def _send(self, message: OutboxMessage) -> Callable[[], Awaitable[None]]:
        """Send a message; return the call that stores the result."""
        body, now = message.body.encode(), int(time.time())
        status = 0
        try:
            headers = sign_webhook(message.id, now, body, self._secret)
            status = await self._transport.post(message.url, body, headers, message.share)
            why = f"it answered {status}"
        except ServerError as error:
            why = error.detail
        except Exception as error:  # must not stop the other messages
            _log.error("unexpected error", job_id=message.job_id, exc_info=error)
            why = "an unexpected error"
        if status // 100 == HTTPStatus.OK // 100:
            return lambda: self._store.delete_message(message)
        if status == HTTPStatus.GONE or message.tries + 1 >= MAX_TRIES:
            _log.warning("a webhook message is dropped", job_id=message.job_id, reason=why)
            return lambda: self._store.delete_message(message)
        wait = self._backoff[min(message.tries, len(self._backoff) - 1)]
        _log.info("a webhook message is retried", job_id=message.job_id, reason=why, seconds=wait)
        due = self._now() + wait
        return lambda: self._store.postpone(message, due)


def sign_webhook(message_id: str, timestamp: int, body: bytes, secret: str) -> dict[str, str]:
    """Return the headers of a message, signed if there is a secret. After the prefix `whsec_` a secret is base64."""
    headers = {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
    }
    if secret:
        prefix = "whsec_"
        key = (
            base64.b64decode(secret.removeprefix(prefix), validate=True)
            if secret.startswith(prefix)
            else secret.encode()
        )
        content = f"{message_id}.{timestamp}.".encode() + body
        digest = hmac.new(key, content, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers
