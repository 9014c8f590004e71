"""A bucket whose calls are timed. Knows no kind of bucket, and not what becomes of the times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from stable_diffusion_server.errors import InvalidInput, NotFound
from stable_diffusion_server.storage.store_protocol import Store
from stable_diffusion_server.types import StoredObject


class InstrumentedBucket:
    """A bucket before a bucket: `called` is told of each call, its seconds, and whether it failed.

    That nothing is there, or that a name is refused, is an answer and no failure. Listing is not timed: it goes on for
    as long as its reader does.
    """

    def __init__(self, store: Store, called: Callable[[str, float, bool], object]) -> None:
        self._store = store
        self._called = called
        self.close, self.list, self.url = store.close, store.list, store.url

    def open(self) -> None:
        """Make ready."""
        with self._timed("open"):
            self._store.open()

    def stat(self, key: str) -> StoredObject | None:
        """The object or `None`."""
        with self._timed("stat"):
            return self._store.stat(key)

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store if absent."""
        with self._timed("create"):
            return self._store.create(key, data, content_type, record)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store."""
        with self._timed("overwrite"):
            return self._store.overwrite(key, data, content_type, record)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes."""
        with self._timed("read"):
            return self._store.read(key, start, end)

    def delete(self, key: str) -> None:
        """Remove."""
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
