"""Caches which keys are stored, so that a repeated request makes no bucket call: the cache, and a bucket using it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from cachetools import TTLCache

from stable_diffusion_server.errors import NotFound
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.types import StoredObject


class ExistenceCache:
    """Caches up to `capacity` stored objects, each for `seconds`; `capacity` 0 turns the cache off. Thread-safe.

    Each write evicts all expired entries; otherwise a busy server would keep thousands of dead entries.
    """

    def __init__(self, capacity: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._entries: TTLCache[str, StoredObject] = TTLCache(capacity, seconds, timer=now)
        self._lock = threading.Lock()
        self.changes = 0

    def __len__(self) -> int:
        """Return the number of entries that have not expired."""
        with self._lock:
            return len(self._entries)

    def get(self, key: str) -> StoredObject | None:
        """Return the cached object, or `None`. Needs no I/O, so the event loop may call it."""
        with self._lock:
            found: StoredObject | None = self._entries.get(key)
            return found

    def remember(self, key: str, stored: StoredObject | None, since: int | None = None) -> StoredObject | None:
        """Cache `stored` and return it; for `None` and objects that wait in the spool, remove the entry instead.

        For a value read with `stat`, pass the `changes` counter taken before the read; if a write happened since, the
        method does not cache the stale value.
        """
        with self._lock:
            if since is None:
                self.changes += 1
            elif since != self.changes:
                return stored
            self._entries.pop(key, None)
            if stored is not None and not stored.waiting and self._entries.maxsize >= 1:
                self._entries[key] = stored  # evicts expired entries first, then the oldest
        return stored


class CachedBucket(Bucket):
    """Bucket decorator with an existence cache of `capacity` keys for `seconds` each.

    It caches presence, never absence. Deletions and overwrites through this object take effect at once; those of other
    processes take effect when the entry expires.
    """

    def __init__(
        self, bucket: Bucket, capacity: int, seconds: float, now: Callable[[], float] = time.monotonic
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
        """Return the bucket's health."""
        return self._bucket.health()

    def check_capacity(self) -> None:
        """Check the bucket's capacity."""
        self._bucket.check_capacity()

    def spool_stats(self) -> Mapping[str, float]:
        """Return the bucket's spool statistics."""
        return self._bucket.spool_stats()

    def list(self, prefix: str = "") -> Iterator[str]:
        """List the keys in the bucket, without the cache."""
        return self._bucket.list(prefix)

    def url(self, key: str) -> str | None:
        """Return the bucket's URL of the object."""
        return self._bucket.url(key)

    def cached(self, key: str) -> StoredObject | None:
        """Return the object if it is in the cache."""
        return self._cache.get(key)

    def stat(self, key: str) -> StoredObject | None:
        """Return the object from the cache, otherwise from the bucket."""
        since = self._cache.changes
        return self.cached(key) or self._cache.remember(key, self._bucket.stat(key), since)

    def peek(self, key: str) -> StoredObject | None:
        """Return the object from the bucket, without the cache."""
        return self._bucket.peek(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Create the object in the bucket without reading the cache, and cache the result."""
        stored, created = self._bucket.create(key, data, content_type, record)
        self._cache.remember(key, stored)
        return stored, created

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Remove the cache entry, write, and cache the result."""
        self._cache.remember(key, None)
        stored = self._bucket.overwrite(key, data, content_type, record)
        self._cache.remember(key, stored)
        return stored

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Read from the bucket. On `NotFound` remove the entry, since another process deleted the object."""
        try:
            return self._bucket.read(key, start, end)
        except NotFound:
            self._cache.remember(key, None)
            raise

    def delete(self, key: str) -> None:
        """Delete the object; remove the entry before and after, because a concurrent `stat` may cache it again."""
        self._cache.remember(key, None)
        self._bucket.delete(key)
        self._cache.remember(key, None)
