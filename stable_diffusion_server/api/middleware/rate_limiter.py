"""Limits the rate and the concurrency of each caller's requests."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItem

from stable_diffusion_server.concurrency import MovingWindows
from stable_diffusion_server.errors import RateLimited


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """The limits of one caller, identified by `who`; rate `None` and concurrency 0 mean no limit."""

    who: str
    rate: RateLimitItem | None = None
    concurrency: int = 0


class RateLimiter:
    """Counts requests in a moving window, and running requests. For one event loop."""

    def __init__(self) -> None:
        self._windows = MovingWindows()
        self._running: Counter[str] = Counter()

    async def enter(self, allowed: RateLimitStatus) -> None:
        """Count a request until `leave`. Raises `RateLimited` at a limit, without counting."""
        if allowed.concurrency and self._running[allowed.who] >= allowed.concurrency:
            raise RateLimited(f"{allowed.concurrency} requests at a time are allowed here.", retry_after=1)
        if allowed.rate is not None and not self._windows.hit(allowed.who, allowed.rate):
            _, seconds = self._windows.remaining(allowed.who, allowed.rate)
            raise RateLimited(f"{_describe(allowed.rate)} are allowed here.", retry_after=max(1, math.ceil(seconds)))
        self._running[allowed.who] += 1

    def leave(self, allowed: RateLimitStatus) -> None:
        """End a request that `enter` counted."""
        self._running[allowed.who] -= 1
        if not self._running[allowed.who]:
            del self._running[allowed.who]

    async def headers(self, allowed: RateLimitStatus) -> dict[str, str]:
        """Return the `RateLimit-…` headers of the IETF draft "RateLimit header fields for HTTP"; none if unlimited."""
        if allowed.rate is None:
            return {}
        left, seconds = self._windows.remaining(allowed.who, allowed.rate)
        return {
            "RateLimit-Limit": str(allowed.rate.amount),
            "RateLimit-Remaining": str(left),
            "RateLimit-Reset": str(math.ceil(seconds)),
            "RateLimit-Policy": f"{allowed.rate.amount};w={allowed.rate.get_expiry()}",
        }


def _describe(rate: RateLimitItem) -> str:
    return f"{rate.amount} requests in {rate.get_expiry()} seconds"
