"""Bucket in memory, for tests."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping

from stable_diffusion_server.errors import NotFound
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.types import StoredObject


class MemoryBucket(Bucket):
    """Objects in a dictionary. Thread-safe."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, StoredObject]] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Do nothing: there is nothing to open."""

    def stat(self, key: str) -> StoredObject | None:
        """Return the object under `key`, or `None` if it is absent or incomplete."""
        _, stored = self._objects.get(key, (b"", None))
        return stored if stored is not None and stored.is_complete else None

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent; of concurrent writers the first wins and the others get its object."""
        with self._lock:
            if (there := self.stat(key)) is not None:
                return there, False
            return self._put(key, data, content_type, record), True

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`."""
        with self._lock:
            return self._put(key, data, content_type, record)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive). Raises `NotFound`."""
        if key not in self._objects:
            raise NotFound("There is no picture under this name.")
        return self._objects[key][0][start:end]

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        with self._lock:
            self._objects.pop(key, None)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Return the keys that start with `prefix`, sorted."""
        with self._lock:
            found = sorted(key for key, (data, _) in self._objects.items() if data and key.startswith(prefix))
        return iter(found)

    def _put(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        stored = StoredObject(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record))
        self._objects[key] = (bytes(data), stored)
        return stored
