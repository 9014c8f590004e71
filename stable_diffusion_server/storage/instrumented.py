"""Bucket decorator that reports duration and failure of each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from stable_diffusion_server.errors import InvalidInput, NotFound
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.types import StoredObject


class InstrumentedBucket(Bucket):
    """Calls `store` and reports each call to `called`: name, duration in seconds, whether it failed.

    `NotFound` and `InvalidInput` are answers, not failures. `list` is not measured, because its duration depends on the
    reader's iteration.
    """

    def __init__(self, store: Bucket, called: Callable[[str, float, bool], object]) -> None:
        self._store = store
        self._called = called

    def open(self) -> None:
        """Open the store."""
        with self._timed("open"):
            self._store.open()

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def health(self) -> str | None:
        """Return the store's health."""
        return self._store.health()

    def check_capacity(self) -> None:
        """Check the store's capacity."""
        self._store.check_capacity()

    def peek(self, key: str) -> StoredObject | None:
        """Call and time `peek`, reported as "stat"."""
        with self._timed("stat"):
            return self._store.peek(key)

    def list(self, prefix: str = "") -> Iterator[str]:
        """List the keys that start with `prefix`."""
        return self._store.list(prefix)

    def url(self, key: str) -> str | None:
        """Return the store's URL of the object."""
        return self._store.url(key)

    def stat(self, key: str) -> StoredObject | None:
        """Call and time `stat`."""
        with self._timed("stat"):
            return self._store.stat(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Call and time `create`."""
        with self._timed("create"):
            return self._store.create(key, data, content_type, record)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Call and time `overwrite`."""
        with self._timed("overwrite"):
            return self._store.overwrite(key, data, content_type, record)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Call and time `read`."""
        with self._timed("read"):
            return self._store.read(key, start, end)

    def delete(self, key: str) -> None:
        """Call and time `delete`."""
        with self._timed("delete"):
            self._store.delete(key)

    @contextmanager
    def _timed(self, call: str) -> Iterator[None]:
        started, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        except (InvalidInput, NotFound):
            failed = False
            raise
        finally:
            self._called(call, time.perf_counter() - started, failed)
