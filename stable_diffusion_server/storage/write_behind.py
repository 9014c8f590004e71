"""Write-behind bucket: spools images on disk and uploads them in the background while the bucket is down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from stable_diffusion_server.errors import InvalidInput, NotFound, ServerError, StorageRefused, StorageUnavailable
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.bounded_calls import BoundedCalls
from stable_diffusion_server.storage.spool import SpooledObject, UploadSpool
from stable_diffusion_server.storage.spool_uploader import SpoolUploader
from stable_diffusion_server.types import StoredObject


class WriteBehindBucket(Bucket):
    """Bucket decorator that accepts images while `store` is down (circuit breaker and write-behind queue).

    It writes an image to the spool, uploads it, and removes it from the spool. If the upload fails or takes longer than
    `timeout` seconds, the image stays in the spool and counts as stored with `waiting` set; the background thread
    uploads it later, also after a restart. During an outage only the background thread tries the store, every
    `poll_seconds` at first, with exponential backoff.

    A timed-out write may still complete. Until it has, no other upload of that key starts, so it cannot overwrite
    newer data.
    """

    def __init__(self, store: Bucket, spool: UploadSpool, timeout: float, poll_seconds: float = 1.0) -> None:
        self._store = store
        self._spool = spool
        self._timeout = timeout
        self._calls = BoundedCalls(store, timeout)
        self._uploader = SpoolUploader(store, spool, self._calls, poll_seconds)

    def open(self) -> None:
        """Open spool and store, and start the uploader, which retries a store that cannot be opened.

        `health` reports such a store. Raises `StorageUnavailable` if the spool's folder is unusable; then call it
        again.
        """
        if self._uploader.started:
            return
        self._spool.open()
        try:
            self._calls.probe()
        except ServerError as error:
            self._calls.mark_down("write", error.detail)
        self._uploader.start()

    def close(self) -> None:
        """Stop the uploader; spooled images stay for the next start."""
        self._uploader.stop(self._timeout)
        self._calls.close()
        self._store.close()

    def health(self) -> str | None:
        """Return why the store has never opened, or that it is down while the spool is full; otherwise `None`."""
        down = self._calls.outage("write")
        if down is not None and not self._calls.was_up:
            return down
        try:
            self.check_capacity()
        except StorageUnavailable as error:
            return error.detail
        return None

    def check_capacity(self) -> None:
        """Raise `StorageUnavailable` if the store is down and the spool is full."""
        if (down := self._calls.outage("write")) is not None:
            try:
                self._spool.check_capacity()
            except StorageUnavailable as error:
                raise StorageUnavailable(f"{down} {error.detail}", retry_after=30) from error

    def spool_stats(self) -> dict[str, float]:
        """Return the numbers of spooled images, bytes, age of the oldest in seconds, failures and dead letters."""
        count, size, age = self._spool.stats()
        dead, failures = len(self._spool.dead_letters), self._calls.failures
        return {"pictures": count, "bytes": size, "oldest_seconds": age, "failures": failures, "dead_letters": dead}

    def stat(self, key: str) -> StoredObject | None:
        """Return the spooled object, otherwise the store's; `None` also during an outage.

        Includes objects that the store rejected after this server accepted them. Raises `InvalidInput` for a rejected
        key.
        """
        try:
            return self.peek(key)
        except StorageUnavailable:
            return None

    def peek(self, key: str) -> StoredObject | None:
        """Do as `stat`, but raise `StorageUnavailable` during an outage."""
        if (spooled := self._find_local(key)) is not None:
            return spooled.stored
        return self._calls.call("read", lambda: self._store.stat(key))

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent. In an outage, the upload after it decides which of several writers wins."""
        if (spooled := self._spool.latest(key)) is not None:
            return spooled.stored, False
        stored = _spooled_object(key, data, content_type, record)
        return self._store_with_fallback(
            data, stored, lambda: self._store.create(key, data, content_type, record), overwrite=False
        )

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`, after earlier uploads of that key."""
        stored = _spooled_object(key, data, content_type, record)
        if self._spool.latest(key) is not None or self._calls.has_pending_write(key):
            self._spool.enqueue(self._spool.put(data, stored, overwrite=True))
            return stored

        def bring() -> tuple[StoredObject, bool]:
            return self._store.overwrite(key, data, content_type, record), True

        return self._store_with_fallback(data, stored, bring, overwrite=True)[0]

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive), from the spool or the store. Raises `NotFound`."""
        if (spooled := self._find_local(key)) is not None:
            with suppress(NotFound):  # the uploader finished meanwhile
                return self._spool.read(spooled)[start:end]
        return self._calls.call("read", lambda: self._store.read(key, start, end))

    def delete(self, key: str) -> None:
        """Delete the object from the spool and from the store."""
        for spooled in self._spool.waiting():
            if spooled.stored.key == key:
                self._spool.drop(spooled)
        self._spool.discard_rejected(key)
        if self._calls.has_pending_write(key) or not self._uploader.upload_lock.acquire(timeout=self._timeout):
            raise StorageUnavailable("The storage is still busy with an earlier write of this name.", retry_after=30)
        try:
            self._calls.call("write", lambda: self._store.delete(key))
        finally:
            self._uploader.upload_lock.release()

    def list(self, prefix: str = "") -> Iterator[str]:
        """List the keys in the store that start with `prefix`, without spooled objects."""
        return self._store.list(prefix)

    def url(self, key: str) -> str | None:
        """Return the store's URL; `None` for a spooled object, which only this server can serve."""
        return None if self._find_local(key) is not None else self._store.url(key)

    def _find_local(self, key: str) -> SpooledObject | None:
        """Return the object that is on this disk and not in the store, or `None`."""
        return self._spool.latest(key) or self._spool.rejected(key)

    def _store_with_fallback(
        self, data: bytes, stored: StoredObject, bring: Callable[[], tuple[StoredObject, bool]], *, overwrite: bool
    ) -> tuple[StoredObject, bool]:
        """Spool and upload. During an outage the image stays spooled; a rejected image becomes a dead letter."""
        spooled: SpooledObject | None = None
        with suppress(StorageUnavailable):  # a full local disk is harmless while the store is up
            spooled = self._spool.put(data, stored, overwrite=overwrite)
        try:
            answer = self._calls.call("write", bring, stored.key)
        except StorageUnavailable:
            if spooled is None:
                raise
            self._spool.enqueue(spooled)
            return stored, True
        except (InvalidInput, StorageRefused) as error:
            if spooled is not None:
                self._spool.reject(spooled, error.detail, caller_informed=True)
            raise
        if spooled is not None:
            self._spool.drop(spooled)
        self._spool.discard_rejected(stored.key)
        return answer


def _spooled_object(key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record), waiting=True)
