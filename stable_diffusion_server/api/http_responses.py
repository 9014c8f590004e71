"""Responses of all routes: encodable JSON, server-sent events, status 499, and security headers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from fastapi import Response
from fastapi.sse import format_sse_event
from starlette import responses
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import RateLimited
from stable_diffusion_server.parsing import dumps

_ALWAYS = {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}
_RESOURCE = b"cross-origin-resource-policy"
# Responses except UI pages load no resources, cannot be framed, and are not cached: they may hold private images.
_DEFAULTS = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}
_log = structlog.get_logger(__name__)
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx must not buffer events
# A follower that accepts no data for this long is disconnected. A slow follower only misses superseded previews.
_SEND_TIMEOUT_SECONDS = 30.0


class JSONResponse(responses.JSONResponse):
    """JSON without lone surrogates and non-finite numbers, which records written by other software may contain."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return dumps(content).encode()


def client_closed_request() -> Response:
    """Return the response for a client that has disconnected: status 499, as in nginx."""
    return Response(status_code=499)


def add_security_headers(message: Message, path: str) -> None:
    """Add the headers to the start of a response. Images may be embedded elsewhere; UI pages set their own policy."""
    # Edits the raw list in one pass, because every response passes here.
    headers = [pair for pair in message["headers"] if pair[0] not in _ALWAYS]
    present = {name for name, _ in headers}
    wanted = {**_ALWAYS, _RESOURCE: b"cross-origin" if path.startswith("/files/") else b"same-origin"}
    if not path.startswith("/ui"):
        wanted |= _DEFAULTS
    message["headers"] = headers + [pair for pair in wanted.items() if pair[0] not in present]


def json_event(body: Mapping[str, object], event: str | None = None, event_id: str | None = None) -> bytes:
    """Return a server-sent event with a JSON body."""
    return format_sse_event(data_str=dumps(body), event=event, id=event_id)


class FollowerLimiter:
    """Limits the followers of jobs: `most` in total, shared fairly by caller; `per_caller`; `per_job`."""

    def __init__(self, most: int, per_caller: int, per_job: int) -> None:
        self._places = FairLimiter(most, per_caller)
        self._per_job = per_job
        self._of_job: Counter[str] = Counter()

    @contextmanager
    def follow(self, job_id: str, share: str) -> Iterator[None]:
        """Count a follower while the block runs. Raises `RateLimited` at a limit, without counting."""
        if self._of_job[job_id] >= self._per_job:
            raise RateLimited(f"{self._per_job} follow this job already.", retry_after=5)
        if not self._places.try_take(share):
            raise RateLimited("You follow as many jobs as can be followed at a time.", retry_after=5)
        self._of_job[job_id] += 1
        try:
            yield
        finally:
            self._places.release(share)
            self._of_job[job_id] -= 1
            if not self._of_job[job_id]:
                del self._of_job[job_id]


class EventResponse(StreamingResponse):
    """Streams the events of a job to one follower, and counts the follower until the response ends."""

    def __init__(self, events: AsyncGenerator[bytes], followers: FollowerLimiter, job_id: str, share: str) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._events = events
        self._followers, self._job_id, self._share = followers, job_id, share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Raises `RateLimited` before it sends anything."""
        reads = True

        async def send_in_time(message: Message) -> None:
            nonlocal reads
            try:
                async with asyncio.timeout(_SEND_TIMEOUT_SECONDS):
                    await send(message)
            except TimeoutError:
                reads = False
                raise

        with self._followers.follow(self._job_id, self._share):
            try:
                await super().__call__(scope, receive, send_in_time)
            except (TimeoutError, ClientDisconnect):
                if reads:
                    raise
                _log.info("disconnected a follower that does not read", job_id=self._job_id)
            finally:
                await self._events.aclose()
