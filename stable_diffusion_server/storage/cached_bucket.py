"""A bucket that remembers what it has seen stored. Knows no HTTP and no kind of bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from stable_diffusion_server.errors import NotFound
from stable_diffusion_server.storage.existence_cache import ExistenceCache
from stable_diffusion_server.storage.write_behind import WriteBehindBucket
from stable_diffusion_server.types import StoredObject


class CachedBucket:
    """A bucket that remembers which keys it has seen stored, so that a hit costs no round trip.

    Only presence is remembered, never absence: at most `capacity` keys, each for `seconds`. What is deleted or
    overwritten through here is forgotten at once; what others do is seen when a key's time is over.
    """

    def __init__(
        self, bucket: WriteBehindBucket, capacity: int, seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._bucket = bucket
        self._cache = ExistenceCache(capacity, seconds, now)

    def open(self) -> None:
        """Open the bucket."""
        self._bucket.open()

    def close(self) -> None:
        """Close the bucket."""
        self._bucket.close()

    def health(self) -> str | None:
        """What is wrong with the bucket, in a sentence; `None` when nothing is."""
        return self._bucket.health()

    def check_capacity(self) -> None:
        """Raise `StorageUnavailable` when the bucket cannot take one more object."""
        self._bucket.check_capacity()

    def figures(self) -> dict[str, float]:
        """What waits to be uploaded, by name."""
        return self._bucket.figures()

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with `prefix`, as the bucket lists them."""
        return self._bucket.list(prefix)

    def url(self, key: str) -> str | None:
        """The bucket's address of an object; `None` for what waits to be uploaded."""
        return self._bucket.url(key)

    def known(self, key: str) -> StoredObject | None:
        """The object under a key if it is remembered, without a call to the bucket."""
        return self._cache.of(key)

    def stat(self, key: str) -> StoredObject | None:
        """As remembered, else as the bucket says."""
        since = self._cache.changes
        return self.known(key) or self._cache.remember(key, self._bucket.stat(key), since)

    def peek(self, key: str) -> StoredObject | None:
        """As the bucket says, whatever is remembered."""
        return self._bucket.peek(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Ask the bucket, whatever is remembered, and remember what it answers."""
        stored, won = self._bucket.create(key, data, content_type, record)
        self._cache.remember(key, stored)
        return stored, won

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Forget, write, and remember what is there now."""
        self._cache.remember(key, None)
        stored = self._bucket.overwrite(key, data, content_type, record)
        self._cache.remember(key, stored)
        return stored

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes; what others have deleted is forgotten. Raises `NotFound`."""
        try:
            return self._bucket.read(key, start, end)
        except NotFound:
            self._cache.remember(key, None)
            raise

    def delete(self, key: str) -> None:
        """Forget and remove, and forget what was learned meanwhile."""
        self._cache.remember(key, None)
        self._bucket.delete(key)
        self._cache.remember(key, None)
