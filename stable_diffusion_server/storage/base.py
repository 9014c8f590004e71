"""Bucket protocol: the methods of every storage backend and bucket decorator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from stable_diffusion_server.errors import InvalidInput, KeyBusy, NotFound, ServerError, StorageUnavailable
from stable_diffusion_server.imaging import DEFAULT_FORMATS, OPTIONAL_FORMATS, matches_signature
from stable_diffusion_server.types import StoredObject


class Bucket(Protocol):
    """A store of objects by key. Methods block on I/O, so call them outside the event loop; safe from any thread.

    All methods raise `StorageUnavailable` when the store does not answer, and `InvalidInput` for a key that the store
    cannot hold. Non-abstract methods have a default for backends without that ability.
    """

    @abstractmethod
    def open(self) -> None:
        """Connect and check that the bucket is writable. May be called again after a failure."""

    def close(self) -> None:
        """Release connections and threads."""
        return

    def health(self) -> str | None:
        """Return why the bucket cannot store images, in one sentence, without I/O; `None` if no reason is known."""
        return None

    def check_capacity(self) -> None:
        """Raise `StorageUnavailable` if one more image cannot be stored. Call it before generating an image."""
        return

    @abstractmethod
    def stat(self, key: str) -> StoredObject | None:
        """Return the object under `key`, or `None` if absent; a write-behind bucket returns `None` in an outage too."""

    def peek(self, key: str) -> StoredObject | None:
        """Do as `stat`, but raise `StorageUnavailable` during an outage. For decisions on access rights."""
        return self.stat(key)

    def cached(self, key: str) -> StoredObject | None:
        """Return the object if a cache knows that it is stored, without I/O; `None` means unknown."""
        return None

    @abstractmethod
    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` atomically if `key` is absent; return the stored object and whether this call stored it."""

    @abstractmethod
    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`; concurrent readers get the old object or the new one, never a mix."""

    @abstractmethod
    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive; `None`: to the last). Raises `NotFound`."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error if it is absent."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with `prefix`."""

    def url(self, key: str) -> str | None:
        """Return the public or signed URL of the object, without I/O; `None` if only this server can serve it."""
        return None

    def spool_stats(self) -> Mapping[str, float]:
        """Return statistics of the upload spool, see `WriteBehindBucket.spool_stats`; empty without a spool."""
        return {}


def check_if_blob_exists(bucket: Bucket, key: str) -> bool:
    """Return whether an object is stored under `key`. The function has this name in the original server."""
    return bucket.stat(key) is not None


def read_image(bucket: Bucket, key: str) -> bytes:
    """Return the whole object under `key`, after checking that it starts with an image signature.

    Raises `NotFound`, and `StorageUnavailable` if the object is not an image or cannot be read.
    """
    data = bucket.read(key)
    if not matches_signature(data, (*DEFAULT_FORMATS, *OPTIONAL_FORMATS)):
        raise StorageUnavailable("What the storage gives under this name is no picture.", retry_after=30)
    return data


def classify_refusal(detail: str, code: object, try_own_key: Callable[[], object]) -> ServerError:
    """Return `InvalidInput` if the same request works for another key, otherwise `StorageUnavailable`.

    `detail` describes the rejection, `code` is the store's error code. `try_own_key` repeats the request with the
    server's own key and raises the store's errors.
    """
    if not is_store_available(try_own_key):
        return StorageUnavailable(detail)
    return InvalidInput(f"save_path makes a name that the storage refuses ({code}).", field="save_path")


def is_store_available(call: Callable[[], object]) -> bool:
    """Return whether the call succeeds, or fails only because the object is absent or another call writes it."""
    try:
        call()
    except (NotFound, KeyBusy):
        return True
    except StorageUnavailable:
        return False
    return True
