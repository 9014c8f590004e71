"""A fair limiter whose callers may have only so many requests under way: beyond that they are refused, not queued."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stable_diffusion_server.concurrency.fair_limiter import FairLimiter
from stable_diffusion_server.errors import RateLimited


class FairRequestQueue:
    """Lets `at_once` requests of all callers run at a time, and one caller have `most` of them running or waiting.

    `refusal` is the sentence that tells a caller who has more. On one event loop.
    """

    def __init__(self, max_running: int, max_per_caller: int, refusal: str) -> None:
        self._limiter = FairLimiter(max_running)
        self._most = max_per_caller
        self._refusal = refusal
        self._asked: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, caller: str) -> AsyncIterator[None]:
        """Wait for this caller's turn, and hold it for as long as the block lasts. Raises `RateLimited`."""
        if self._asked[caller] >= self._most:
            raise RateLimited(self._refusal, retry_after=1)
        self._asked[caller] += 1
        try:
            async with self._limiter.hold(caller):
                yield
        finally:
            self._asked[caller] -= 1
            if not self._asked[caller]:
                del self._asked[caller]
