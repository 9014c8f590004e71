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
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

import structlog

from stable_diffusion_server.errors import JournalUnavailable, ServerError
from stable_diffusion_server.journal.book import Journal
from stable_diffusion_server.journal.clerk import Clerk
from stable_diffusion_server.journal.entries import Message

_log = structlog.get_logger(__name__)

# Seconds to the next try, after the first, the second …; the last one is repeated.
BACK_OFF = (5.0, 30.0, 120.0, 600.0, 3600.0)
MOST_TRIES = 28
_AT_ONCE = 8
_PATIENCE = 5.0


class Post(Protocol):
    """What reaches a webhook. Both raise `InvalidInput` for an address that may not be reached from here."""

    async def check(self, url: str, share: str = ...) -> None:
        """Nothing, if the address may be reached. `share` tells callers apart, who share the capacity."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], share: str = ...) -> int:
        """The status a message was answered with. Raises `RemoteFailed`."""

    def close(self) -> None:
        """Let go of what it holds."""


class Hooks:
    """Sends the journal's messages. `secret` signs them; without one they are not signed."""

    def __init__(self, clerk: Clerk, poster: Post, secret: str, back_off: tuple[float, ...]) -> None:
        self._clerk = clerk
        self._poster = poster
        self._secret = secret
        self._back_off = back_off
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new message."""
        self._wake.set()

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            self._wake.clear()
            try:
                due = await self._clerk(Journal.messages, time.time(), _AT_ONCE)
                await asyncio.gather(*map(self._send, due))
            except JournalUnavailable:
                due = []  # told by the journal
            if not due:
                try:
                    async with asyncio.timeout(min(_PATIENCE, *self._back_off)):
                        await self._wake.wait()
                except TimeoutError:
                    pass  # time to look again

    async def _send(self, message: Message) -> None:
        body, now = message.body.encode(), int(time.time())
        try:
            status = await self._poster.post(message.url, body, signed(message.job_id, now, body, self._secret))
        except ServerError as error:
            status, why = 0, error.detail
        else:
            why = f"it answered {status}"
        if status // 100 == HTTPStatus.OK // 100:
            await self._clerk(Journal.told, message)
        elif status == HTTPStatus.GONE or message.tries + 1 >= MOST_TRIES:
            _log.warning("a webhook is given up", job_id=message.job_id, reason=why)
            await self._clerk(Journal.told, message)
        else:
            wait = self._back_off[min(message.tries, len(self._back_off) - 1)]
            _log.info("a webhook is tried again", job_id=message.job_id, reason=why, seconds=wait)
            await self._clerk(Journal.postpone, message, time.time() + wait)


def signed(job_id: str, timestamp: int, body: bytes, secret: str) -> dict[str, str]:
    """The headers of a message. A secret that begins with `whsec_` is base64 after that, as the standard has it."""
    headers = {
        "Content-Type": "application/json",
        "webhook-id": job_id,
        "webhook-timestamp": str(timestamp),
    }
    if secret:
        prefix = "whsec_"
        key = base64.b64decode(secret.removeprefix(prefix)) if secret.startswith(prefix) else secret.encode()
        content = f"{job_id}.{timestamp}.".encode() + body
        digest = hmac.new(key, content, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers
