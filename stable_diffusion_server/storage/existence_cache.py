"""Which keys are known to be stored: only those that are, only for a while, and bounded. Asks nobody."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from stable_diffusion_server.types import StoredObject


class ExistenceCache:
    """At most `capacity` objects, each known for `seconds` since it was seen. Safe from any thread.

    What is known no longer takes no room: a server that draws new pictures all day would hold its last thousands.
    """

    def __init__(self, capacity: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._seconds = seconds
        self._now = now
        self._known: OrderedDict[str, tuple[float, StoredObject]] = OrderedDict()
        self._lock = threading.Lock()
        self.changes = 0

    def __len__(self) -> int:
        return len(self._known)

    def of(self, key: str) -> StoredObject | None:
        """What is known of `key`; an event loop may ask."""
        with self._lock:
            until, stored = self._known.get(key, (0.0, None))
        return stored if self._now() < until else None

    def remember(self, key: str, stored: StoredObject | None, since: int | None = None) -> StoredObject | None:
        """Take note of what was written or seen, and give it back; what is absent or waits elsewhere is not kept.

        Whoever only looked says how many `changes` there had been before: a write since then makes it no news.
        """
        with self._lock:
            if since is None:
                self.changes += 1
            elif since != self.changes:
                return stored
            self._known.pop(key, None)
            if stored is not None and not stored.waiting and self._capacity:
                self._known[key] = (self._now() + self._seconds, stored)
                self._forget()
        return stored

    def _forget(self) -> None:
        """Let go of what is known no longer, and of the oldest where there is too much; the oldest are in front."""
        now = self._now()
        while self._known and (len(self._known) > self._capacity or next(iter(self._known.values()))[0] <= now):
            self._known.popitem(last=False)
