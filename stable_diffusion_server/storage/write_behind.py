"""A bucket in front of a bucket, which never loses what it was given. Knows no HTTP and no kind of bucket."""

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
    """A bucket in front of `store` that takes a picture whether or not the store does.

    A picture goes to the spool's disk first, then to the store, then off the disk. When the store fails, or does not
    answer within `timeout` seconds, the picture stays spooled, counts as stored but `waiting`, and is brought to the
    store in the background, over restarts. While the store is known to be down nobody waits for it: only the
    background tries, every `poll_seconds` seconds at first and more and more seldom.

    A write that nobody waits for any more may still land. Until it is known to have ended nothing else is brought
    under its key, so that it undoes no later one.
    """

    def __init__(self, store: Bucket, spool: UploadSpool, timeout: float, poll_seconds: float = 1.0) -> None:
        self._store = store
        self._spool = spool
        self._timeout = timeout
        self._calls = BoundedCalls(store, timeout)
        self._uploader = SpoolUploader(store, spool, self._calls, poll_seconds)

    def open(self) -> None:
        """Open spool and store and start the drain. A store that cannot be opened is told by `fault` and tried again.

        Raises `StorageUnavailable` when the spool's folder cannot be used, and may be called again then.
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
        """Stop the drain; what is spooled stays for the next start."""
        self._uploader.stop(self._timeout)
        self._calls.close()
        self._store.close()

    def health(self) -> str | None:
        """Why the store could not be opened since the start, or that it is down and the spool full."""
        down = self._calls.outage("write")
        if down is not None and not self._calls.was_up:
            return down
        try:
            self.check_capacity()
        except StorageUnavailable as error:
            return error.detail
        return None

    def check_capacity(self) -> None:
        """Raises `StorageUnavailable` when the store is down and the spool full: asked before anything is drawn."""
        if (down := self._calls.outage("write")) is not None:
            try:
                self._spool.check_capacity()
            except StorageUnavailable as error:
                raise StorageUnavailable(f"{down} {error.detail}", retry_after=30) from error

    def spool_stats(self) -> dict[str, float]:
        """For the operator: pictures that wait, their bytes, the oldest one's age, failures, and dead letters."""
        count, size, age = self._spool.stats()
        dead, failures = len(self._spool.dead_letters), self._calls.failures
        return {"pictures": count, "bytes": size, "oldest_seconds": age, "failures": failures, "dead_letters": dead}

    def stat(self, key: str) -> StoredObject | None:
        """What waits under `key`, else what the store has; `None` as well while the store is down.

        What the store refused after it was accepted waits too. Raises `InvalidInput` for a name that the store refuses.
        """
        try:
            return self.peek(key)
        except StorageUnavailable:
            return None

    def peek(self, key: str) -> StoredObject | None:
        """The same. Raises `StorageUnavailable` while the store is down."""
        if (kept := self._find_local(key)) is not None:
            return kept.stored
        return self._calls.call("read", lambda: self._store.stat(key))

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent. Who was first while the store was down is settled when it is up again."""
        if (kept := self._spool.latest(key)) is not None:
            return kept.stored, False
        stored = _spooled_object(key, data, content_type, record)
        return self._store_with_fallback(
            data, stored, lambda: self._store.create(key, data, content_type, record), overwrite=False
        )

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`, after whatever waits there already."""
        stored = _spooled_object(key, data, content_type, record)
        if self._spool.latest(key) is not None or self._calls.has_pending_write(key):
            self._spool.enqueue(self._spool.put(data, stored, overwrite=True))
            return stored

        def bring() -> tuple[StoredObject, bool]:
            return self._store.overwrite(key, data, content_type, record), True

        return self._store_with_fallback(data, stored, bring, overwrite=True)[0]

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to before `end`, from the spool or the store. Raises `NotFound`."""
        if (kept := self._find_local(key)) is not None:
            with suppress(NotFound):  # brought to the store this very moment
                return self._spool.read(kept)[start:end]
        return self._calls.call("read", lambda: self._store.read(key, start, end))

    def delete(self, key: str) -> None:
        """Remove it from the spool and from the store."""
        for kept in self._spool.waiting():
            if kept.stored.key == key:
                self._spool.drop(kept)
        self._spool.discard_rejected(key)
        if self._calls.has_pending_write(key) or not self._uploader.upload_lock.acquire(timeout=self._timeout):
            raise StorageUnavailable("The storage is still busy with an earlier write of this name.", retry_after=30)
        try:
            self._calls.call("write", lambda: self._store.delete(key))
        finally:
            self._uploader.upload_lock.release()

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys in the store that begin with `prefix`."""
        return self._store.list(prefix)

    def url(self, key: str) -> str | None:
        """The store's address; `None` for what waits here, which only this server can give."""
        return None if self._find_local(key) is not None else self._store.url(key)

    def _find_local(self, key: str) -> SpooledObject | None:
        """What is kept here and not in the store."""
        return self._spool.latest(key) or self._spool.rejected(key)

    def _store_with_fallback(
        self, data: bytes, stored: StoredObject, bring: Callable[[], tuple[StoredObject, bool]], *, overwrite: bool
    ) -> tuple[StoredObject, bool]:
        """Spool, bring, and take off the spool; or leave it there, waiting; or set it aside, and tell the caller."""
        kept: SpooledObject | None = None
        with suppress(StorageUnavailable):  # a full disk here is no harm as long as the store is up
            kept = self._spool.put(data, stored, overwrite=overwrite)
        try:
            answer = self._calls.call("write", bring, stored.key)
        except StorageUnavailable:
            if kept is None:
                raise
            self._spool.enqueue(kept)
            return stored, True
        except (InvalidInput, StorageRefused) as error:
            if kept is not None:
                self._spool.reject(kept, error.detail, caller_informed=True)
            raise
        if kept is not None:
            self._spool.drop(kept)
        self._spool.discard_rejected(stored.key)
        return answer


def _spooled_object(key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
    return StoredObject(key, len(data), hashlib.sha256(data).hexdigest(), content_type, dict(record), waiting=True)
