"""Bucket protocol: what every storage backend does, and how images are read from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.imaging import DEFAULT_FORMATS, OPTIONAL_FORMATS, matches_signature
from stable_diffusion_server.types import StoredObject


class Bucket(Protocol):
    """A store of objects by key. Methods block, so callers keep them off the event loop.

    All raise `StorageUnavailable` when the store does not answer, and `InvalidInput` for a key it cannot hold.
    """

    def open(self) -> None:
        """Make ready for use. May be called again after it failed."""

    def close(self) -> None:
        """Let go of connections and threads."""

    def health(self) -> str | None:
        """One sentence on what keeps the store from taking pictures, as far as it is known without asking it."""

    def check_capacity(self) -> None:
        """Raises `StorageUnavailable` when a new picture could not be kept: asked before it is drawn."""

    def stat(self, key: str) -> StoredObject | None:
        """The object under `key`, or `None`; a bucket that spools says `None` as well while its store is down."""

    def peek(self, key: str) -> StoredObject | None:
        """The same for what a right depends on: never `None` for an object that could not be looked for."""

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` only if `key` is absent, atomically; returns what is stored, and whether by this call."""

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key` whether or not something was there; no reader sees half of it."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to before `end` (to the last one for `None`); fewer beyond the end. Raises `NotFound`."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with `prefix`."""

    def url(self, key: str) -> str | None:
        """The address anyone may fetch the object at; `None` when only this server can give it. Asks no one."""


def check_if_blob_exists(bucket: Bucket, key: str) -> bool:
    """Whether an object of that key is stored. The name is the one users know from the original server."""
    return bucket.stat(key) is not None


def read_picture(bucket: Bucket, key: str) -> bytes:
    """The whole object under `key`, of which the first bytes are a picture's.

    Raises `NotFound`, and `StorageUnavailable` for what is no picture or could not be read.
    """
    data = bucket.read(key)
    if not matches_signature(data, (*DEFAULT_FORMATS, *OPTIONAL_FORMATS)):
        raise StorageUnavailable("What the storage gives under this name is no picture.", retry_after=30)
    return data
