"""Counts events within the last seconds, by a clock that is never set. Knows no requests."""

from __future__ import annotations

import time
from collections import deque

from limits import RateLimitItem

# Callers whose windows are all past are forgotten when so many are remembered.
_MOST_REMEMBERED = 10_000


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

    def remaining(self, who: str, rate: RateLimitItem) -> tuple[int, float]:
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


def _drop_before(hits: deque[float], moment: float) -> None:
    while hits and hits[0] <= moment:
        hits.popleft()
