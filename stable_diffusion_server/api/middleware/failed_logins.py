"""Wrong keys by the address they come from: the more, the later the next is looked at. Bounded in memory."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

_MINUTE, _HOUR = 60.0, 3600.0
_MOST_ADDRESSES, _MOST_GOOD = 10_000, 16


@dataclass(slots=True)
class _Tries:
    """Wrong keys of one address within the minute and the hour that began then, and right ones it sent meanwhile."""

    minute: float
    hour: float
    in_minute: int = 0
    in_hour: int = 0
    good: set[str] = field(default_factory=set)


class FailedLoginLimiter:
    """Counts wrong keys. After `a_minute` of them an address is told to wait, whatever wrong ones it sends.

    Others behind the same address are not locked out: a right key is taken all the same; after `an_hour` wrong ones,
    only if the address has shown it meanwhile. `now` is a clock that never jumps. Used from the event loop alone.
    """

    def __init__(self, a_minute: int = 20, an_hour: int = 1000, now: Callable[[], float] = time.monotonic) -> None:
        self._a_minute = a_minute
        self._an_hour = an_hour
        self._now = now
        self._tries: OrderedDict[str, _Tries] = OrderedDict()

    def wrong(self, address: str) -> int:
        """Count one; the seconds to wait before the next is looked at, 0 while few were wrong."""
        now = self._now()
        tries = self._of(address, now) or _Tries(now, now)
        self._tries[address] = tries
        self._tries.move_to_end(address)
        if len(self._tries) > _MOST_ADDRESSES:
            self._tries.popitem(last=False)
        tries.in_minute += 1
        tries.in_hour += 1
        if tries.in_minute <= self._a_minute:
            return 0
        return max(1, math.ceil(tries.minute + _MINUTE - now))

    def right(self, address: str, name: str) -> int:
        """Note that a right key came; the seconds it has to wait, since too many wrong ones came from there before."""
        now = self._now()
        tries = self._of(address, now)
        if tries is None or name in tries.good:
            return 0
        if tries.in_hour > self._an_hour:
            return max(1, math.ceil(tries.hour + _HOUR - now))
        if len(tries.good) < _MOST_GOOD:
            tries.good.add(name)
        return 0

    def __len__(self) -> int:
        return len(self._tries)

    def _of(self, address: str, now: float) -> _Tries | None:
        tries = self._tries.get(address)
        if tries is not None and now - tries.hour >= _HOUR:
            del self._tries[address]
            return None
        if tries is not None and now - tries.minute >= _MINUTE:
            tries.minute, tries.in_minute = now, 0
        return tries
