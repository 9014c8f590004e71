"""How often, and how many at a time, one caller may ask for pictures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItem

from stable_diffusion_server.concurrency import MovingWindows
from stable_diffusion_server.errors import RateLimited


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """What one caller is allowed: `who` tells callers apart; no rate, and concurrency 0, are no limit."""

    who: str
    rate: RateLimitItem | None = None
    concurrency: int = 0


class RateLimiter:
    """Counts requests in a moving window, and those under way. Used from the event loop alone."""

    def __init__(self) -> None:
        self._windows = MovingWindows()
        self._under_way: Counter[str] = Counter()

    async def enter(self, allowed: RateLimitStatus) -> None:
        """Count a request in; `leave` counts it out. Raises `RateLimited`, which counts nothing."""
        if allowed.concurrency and self._under_way[allowed.who] >= allowed.concurrency:
            raise RateLimited(f"{allowed.concurrency} requests at a time are allowed here.", retry_after=1)
        if allowed.rate is not None and not self._windows.hit(allowed.who, allowed.rate):
            _, seconds = self._windows.remaining(allowed.who, allowed.rate)
            raise RateLimited(f"{_told(allowed.rate)} are allowed here.", retry_after=max(1, math.ceil(seconds)))
        self._under_way[allowed.who] += 1

    def leave(self, allowed: RateLimitStatus) -> None:
        """Count a request out that was counted in."""
        self._under_way[allowed.who] -= 1
        if not self._under_way[allowed.who]:
            del self._under_way[allowed.who]

    async def headers(self, allowed: RateLimitStatus) -> dict[str, str]:
        """What a caller is told of its limit: how many in a window, how many are left, and seconds until there is room.

        Names and meanings as in the IETF's draft "RateLimit header fields for HTTP"; nothing without a rate.
        """
        if allowed.rate is None:
            return {}
        left, seconds = self._windows.remaining(allowed.who, allowed.rate)
        return {
            "RateLimit-Limit": str(allowed.rate.amount),
            "RateLimit-Remaining": str(left),
            "RateLimit-Reset": str(math.ceil(seconds)),
            "RateLimit-Policy": f"{allowed.rate.amount};w={allowed.rate.get_expiry()}",
        }


def _told(rate: RateLimitItem) -> str:
    return f"{rate.amount} requests in {rate.get_expiry()} seconds"
