"""A bucket that remembers what it has seen stored. Knows no HTTP and no kind of bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from stable_diffusion_server.errors import NotFound
from stable_diffusion_server.storage.existence_cache import Knowledge
from stable_diffusion_server.storage.write_behind import Spooling
from stable_diffusion_server.types import Stored


class Remembering:
    """A bucket that remembers which keys it has seen stored, so that a hit costs no round trip.

    Only presence is remembered, never absence: at most `capacity` keys, each for `seconds`. What is deleted or
    overwritten through here is forgotten at once; what others do is seen when a key's time is over.
    """

    def __init__(
        self, bucket: Spooling, capacity: int, seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._bucket = bucket
        self._knowledge = Knowledge(capacity, seconds, now)
        self.known, self._learned = self._knowledge.of, self._knowledge.learn
        self.open, self.close, self.fault, self.admit = bucket.open, bucket.close, bucket.fault, bucket.admit
        self.list, self.url, self.figures = bucket.list, bucket.url, bucket.figures

    def stat(self, key: str) -> Stored | None:
        """As remembered, else as the bucket says."""
        since = self._knowledge.changes
        return self.known(key) or self._learned(key, self._bucket.stat(key), since)

    def look(self, key: str) -> Stored | None:
        """As the bucket says, whatever is remembered."""
        return self._bucket.look(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[Stored, bool]:
        """Ask the bucket, whatever is remembered, and remember what it answers."""
        stored, won = self._bucket.create(key, data, content_type, record)
        self._learned(key, stored)
        return stored, won

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        """Forget, write, and remember what is there now."""
        self._learned(key, None)
        stored = self._bucket.overwrite(key, data, content_type, record)
        self._learned(key, stored)
        return stored

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes; what others have deleted is forgotten. Raises `NotFound`."""
        try:
            return self._bucket.read(key, start, end)
        except NotFound:
            self._learned(key, None)
            raise

    def delete(self, key: str) -> None:
        """Forget and remove, and forget what was learned meanwhile."""
        self._learned(key, None)
        self._bucket.delete(key)
        self._learned(key, None)
