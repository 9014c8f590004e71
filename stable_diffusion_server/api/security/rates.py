"""How often, and how many at a time, one caller may ask for pictures."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass

from limits import RateLimitItem

from stable_diffusion_server.errors import Overasked

# Callers whose windows are all past are forgotten when so many are remembered.
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one caller is allowed: `who` tells callers apart; no rate, and concurrency 0, are no limit."""

    who: str
    rate: RateLimitItem | None = None
    concurrency: int = 0


class MovingWindows:
    """Counts what each caller did within the last seconds, by a clock that is never set.

    The storages of `limits` go by the time of day: set back by an hour, it keeps callers out for that hour.
    """

    def __init__(self) -> None:
        self._hits: dict[tuple[str, int], deque[float]] = {}
        self._sweep_at = _MOST_REMEMBERED

    def hit(self, who: str, rate: RateLimitItem) -> bool:
        """Count one more, if the rate allows it."""
        hits = self._recent(who, rate)
        if len(hits) >= rate.amount:
            return False
        hits.append(time.monotonic())
        self._hits[who, rate.get_expiry()] = hits
        if len(self._hits) > self._sweep_at:
            self._sweep()
        return True

    def left(self, who: str, rate: RateLimitItem) -> tuple[int, float]:
        """How many more there may be, and the seconds until the oldest one counts no more."""
        hits = self._recent(who, rate)
        seconds = hits[0] + rate.get_expiry() - time.monotonic() if hits else 0.0
        return max(0, rate.amount - len(hits)), max(0.0, seconds)

    def _recent(self, who: str, rate: RateLimitItem) -> deque[float]:
        window = rate.get_expiry()
        hits = self._hits.get((who, window), deque())
        _drop_before(hits, time.monotonic() - window)
        return hits

    def _sweep(self) -> None:
        now = time.monotonic()
        for (who, window), hits in list(self._hits.items()):
            _drop_before(hits, now - window)
            if not hits:
                del self._hits[who, window]
        # A crowd that is all within its windows is looked through again when it has doubled, not at every request.
        self._sweep_at = max(_MOST_REMEMBERED, 2 * len(self._hits))


class Rates:
    """Counts requests in a moving window, and those under way. Used from the event loop alone."""

    def __init__(self) -> None:
        self._windows = MovingWindows()
        self._under_way: Counter[str] = Counter()

    async def enter(self, allowed: Allowed) -> None:
        """Count a request in; `leave` counts it out. Raises `Overasked`, which counts nothing."""
        if allowed.concurrency and self._under_way[allowed.who] >= allowed.concurrency:
            raise Overasked(f"{allowed.concurrency} requests at a time are allowed here.", retry_after=1)
        if allowed.rate is not None and not self._windows.hit(allowed.who, allowed.rate):
            _, seconds = self._windows.left(allowed.who, allowed.rate)
            raise Overasked(f"{_told(allowed.rate)} are allowed here.", retry_after=max(1, math.ceil(seconds)))
        self._under_way[allowed.who] += 1

    def leave(self, allowed: Allowed) -> None:
        """Count a request out that was counted in."""
        self._under_way[allowed.who] -= 1
        if not self._under_way[allowed.who]:
            del self._under_way[allowed.who]

    async def headers(self, allowed: Allowed) -> dict[str, str]:
        """What a caller is told of its limit: how many in a window, how many are left, and seconds until there is room.

        Names and meanings as in the IETF's draft "RateLimit header fields for HTTP"; nothing without a rate.
        """
        if allowed.rate is None:
            return {}
        left, seconds = self._windows.left(allowed.who, allowed.rate)
        return {
            "RateLimit-Limit": str(allowed.rate.amount),
            "RateLimit-Remaining": str(left),
            "RateLimit-Reset": str(math.ceil(seconds)),
            "RateLimit-Policy": f"{allowed.rate.amount};w={allowed.rate.get_expiry()}",
        }


def _drop_before(hits: deque[float], moment: float) -> None:
    while hits and hits[0] <= moment:
        hits.popleft()


def _told(rate: RateLimitItem) -> str:
    return f"{rate.amount} requests in {rate.get_expiry()} seconds"
