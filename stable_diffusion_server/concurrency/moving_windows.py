"""Counts events per caller in moving time windows, and keeps moving averages."""

from __future__ import annotations

import time
from collections import deque

from limits import RateLimitItem

# Number of windows at which expired ones are removed.
_SWEEP_SIZE = 10_000
# Weight of the newest sample: the average follows a change within about ten samples.
_WEIGHT = 0.2


class MovingWindows:
    """Counts each caller's events of the last seconds.

    The storage classes of `limits` use wall-clock time: if the clock is set back by an hour, they reject callers for
    that hour. A bounded cache is no substitute either, since evicting a window would lift that caller's limit.
    """

    def __init__(self) -> None:
        self._hits: dict[tuple[str, int], deque[float]] = {}
        self._sweep_at = _SWEEP_SIZE

    def hit(self, caller: str, rate: RateLimitItem) -> bool:
        """Count one event if the rate allows it; return whether it does."""
        hits = self._recent(caller, rate)
        if len(hits) >= rate.amount:
            return False
        hits.append(time.monotonic())
        self._hits[caller, rate.get_expiry()] = hits
        if len(self._hits) > self._sweep_at:
            self._sweep()
        return True

    def remaining(self, caller: str, rate: RateLimitItem) -> tuple[int, float]:
        """How many more events the rate allows, and the seconds until the oldest one leaves the window."""
        hits = self._recent(caller, rate)
        seconds = hits[0] + rate.get_expiry() - time.monotonic() if hits else 0.0
        return max(0, rate.amount - len(hits)), max(0.0, seconds)

    def _recent(self, caller: str, rate: RateLimitItem) -> deque[float]:
        window = rate.get_expiry()
        hits = self._hits.get((caller, window), deque())
        _drop_before(hits, time.monotonic() - window)
        return hits

    def _sweep(self) -> None:
        now = time.monotonic()
        for (caller, window), hits in list(self._hits.items()):
            _drop_before(hits, now - window)
            if not hits:
                del self._hits[caller, window]
        # If all windows are in use, the next sweep waits until their number has doubled, not for the next event.
        self._sweep_at = max(_SWEEP_SIZE, 2 * len(self._hits))


def _drop_before(hits: deque[float], moment: float) -> None:
    while hits and hits[0] <= moment:
        hits.popleft()


def moving_average(average: float | None, sample: float) -> float:
    """The average after one more sample; the sample itself if there was none before."""
    return sample if average is None else (1 - _WEIGHT) * average + _WEIGHT * sample
