"""Limits the rate and concurrency of each caller's requests, and attempts with wrong API keys by address."""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from limits import RateLimitItem

from stable_diffusion_server.concurrency import MovingWindows
from stable_diffusion_server.errors import RateLimited

_MINUTE, _HOUR = 60.0, 3600.0
_MAX_ADDRESSES, _MAX_GOOD_KEYS = 10_000, 16


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


@dataclass(slots=True)
class _Attempts:
    """Wrong keys of one address since the start of its minute and its hour, and names of right keys it sent."""

    minute: float
    hour: float
    in_minute: int = 0
    in_hour: int = 0
    good: set[str] = field(default_factory=set)


class FailedLoginLimiter:
    """Counts wrong keys. After `a_minute` wrong keys in a minute, further ones from that address must wait.

    Right keys still pass, so that other users behind the same address are not locked out. After `an_hour` wrong keys in
    an hour, a right key passes only if the address sent it before. `now` is a monotonic clock. For one event loop.
    """

    def __init__(self, a_minute: int = 20, an_hour: int = 1000, now: Callable[[], float] = time.monotonic) -> None:
        self._a_minute = a_minute
        self._an_hour = an_hour
        self._now = now
        self._attempts: OrderedDict[str, _Attempts] = OrderedDict()

    def wrong(self, address: str) -> int:
        """Count a wrong key. Return the seconds to wait before the next attempt, 0 below the limit."""
        now = self._now()
        attempts = self._of(address, now) or _Attempts(now, now)
        self._attempts[address] = attempts
        self._attempts.move_to_end(address)
        if len(self._attempts) > _MAX_ADDRESSES:
            self._attempts.popitem(last=False)
        attempts.in_minute += 1
        attempts.in_hour += 1
        if attempts.in_minute <= self._a_minute:
            return 0
        return max(1, math.ceil(attempts.minute + _MINUTE - now))

    def right(self, address: str, name: str) -> int:
        """Record a right key. Return the seconds to wait, above 0 after too many wrong keys from that address."""
        now = self._now()
        attempts = self._of(address, now)
        if attempts is None or name in attempts.good:
            return 0
        if attempts.in_hour > self._an_hour:
            return max(1, math.ceil(attempts.hour + _HOUR - now))
        if len(attempts.good) < _MAX_GOOD_KEYS:
            attempts.good.add(name)
        return 0

    def __len__(self) -> int:
        return len(self._attempts)

    def _of(self, address: str, now: float) -> _Attempts | None:
        attempts = self._attempts.get(address)
        if attempts is not None and now - attempts.hour >= _HOUR:
            del self._attempts[address]
            return None
        if attempts is not None and now - attempts.minute >= _MINUTE:
            attempts.minute, attempts.in_minute = now, 0
        return attempts
