"""An answer of server-sent events to one of a bounded number of readers, each of whom has to read."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import RateLimited

_log = structlog.get_logger(__name__)

_NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy that collects events defeats them
# Who takes nothing for so long does not read; whoever is slow is told less, since a preview supersedes the one before.
_SECONDS_TO_READ = 30.0


class FollowerLimiter:
    """Counts who follows jobs: at most `most` in all, shared out by caller, of one caller and of one job."""

    def __init__(self, most: int, per_caller: int, per_job: int) -> None:
        self._places = FairLimiter(most, per_caller)
        self._per_job = per_job
        self._of_job: Counter[str] = Counter()

    @contextmanager
    def follow(self, job_id: str, share: str) -> Iterator[None]:
        """Count a follower for as long as the block lasts. Raises `RateLimited`, which counts nothing."""
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
    """Sends events of a job to one of its followers; ends the connection of one who does not read.

    The follower is counted while the answer is sent, so that one who leaves at any moment is counted out.
    """

    def __init__(self, events: AsyncGenerator[str], followers: FollowerLimiter, job_id: str, share: str) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_NO_STORE)
        self._events = events
        self._followers, self._job_id, self._share = followers, job_id, share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. Raises `RateLimited` before anything is sent."""
        reads = True

        async def send_in_time(message: Message) -> None:
            nonlocal reads
            try:
                async with asyncio.timeout(_SECONDS_TO_READ):
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
                _log.info("a follower does not read; its connection is closed", job_id=self._job_id)
            finally:
                await self._events.aclose()
