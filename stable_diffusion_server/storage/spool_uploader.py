"""Brings what waits in a spool to the store, in the background, past whatever the store does not take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from stable_diffusion_server.errors import (
    InvalidInput,
    KeyBusy,
    NotFound,
    ServerError,
    StorageRefused,
    StorageUnavailable,
)
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.bounded_calls import BoundedCalls
from stable_diffusion_server.storage.spool import SpooledObject, UploadSpool

_log = structlog.get_logger(__name__)

_MAX_POLL_SECONDS = 60.0
_MAX_BACKOFF_SECONDS = 600.0
# With pauses that double from a second on: about a quarter of an hour in which the store took others.
_MAX_TRIES = 10


@dataclass(slots=True)
class _FailedUpload:
    """How often an object was tried in vain while the store was well, and when it may be tried again (monotonic)."""

    tries: int = 0
    due: float = 0.0


class SpoolUploader:
    """A thread that looks every `poll_seconds` seconds at what waits, and more and more seldom while the store is down.

    An object that fails while the store takes others is tried again by itself, ever later, and in the end set aside;
    one that is refused is set aside at once. Objects of one key are brought in the order in which they came.
    """

    def __init__(self, store: Bucket, spool: UploadSpool, calls: BoundedCalls, poll_seconds: float) -> None:
        self._store = store
        self._spool = spool
        self._calls = calls
        self._poll_seconds = poll_seconds
        self._failures: dict[Path, _FailedUpload] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        # Held while one object is brought.
        self.upload_lock = threading.Lock()

    @property
    def started(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Bring nothing more; the object at hand gets so long."""
        self._stop = True
        self._calls.outage_event.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        poll_seconds = self._poll_seconds
        while not self._stop:
            if self._calls.outage_event.wait(poll_seconds):
                self._calls.outage_event.clear()
                poll_seconds = self._poll_seconds
            if self._stop:
                return
            # Each by itself: a bucket that may only be read is to be read again after an outage.
            well = [self._succeeds("read", self._probe_read), self._succeeds("write", self._upload_queued)]
            poll_seconds = self._poll_seconds if all(well) else min(2 * poll_seconds, _MAX_POLL_SECONDS)

    def _succeeds(self, what: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except ServerError as error:
            self._calls.mark_down(what, error.detail)
        except Exception:
            _log.exception("the spool stumbled and goes on")
        else:
            return True
        return False

    def _probe_read(self) -> None:
        if self._calls.outage("read") is None:
            return
        with suppress(InvalidInput, NotFound):  # an answer of a store that is well
            self._calls.call_even_if_down(lambda: self._store.stat("?"))
        self._calls.mark_up("read")

    def _upload_queued(self) -> None:
        """Bring what waits. Raises `StorageUnavailable` when the store turns out to be down."""
        self._spool.enqueue_retried()
        if self._calls.outage("write") is not None:
            self._calls.probe()
            self._calls.mark_up("write")
        waiting = self._spool.waiting()
        self._failures = {kept.path: self._failures[kept.path] for kept in waiting if kept.path in self._failures}
        oldest: dict[str, SpooledObject] = {}
        for kept in waiting:
            oldest.setdefault(kept.stored.key, kept)
        # What failed before is tried behind all that did not.
        waiting.sort(key=lambda kept: (oldest[kept.stored.key].path in self._failures, kept.path))
        held: set[str] = set()
        for kept in waiting:
            if self._stop:
                return
            if kept.stored.key not in held and not self._try_upload(kept):
                held.add(kept.stored.key)

    def _try_upload(self, kept: SpooledObject) -> bool:
        """Bring an object if it is its turn; whether the next one under its key may follow."""
        failed = self._failures.get(kept.path)
        if failed is not None and time.monotonic() < failed.due:
            return False
        with self.upload_lock:
            if self._calls.has_pending_write(kept.stored.key):
                return False
            try:
                self._upload(kept)
            except (InvalidInput, StorageRefused) as error:
                self._spool.reject(kept, error.detail)
            except StorageUnavailable as error:
                if not isinstance(error, KeyBusy):
                    self._calls.probe()  # raises when it is the store, and not this object
                return self._record_failure(kept, error.detail)
        return True

    def _upload(self, kept: SpooledObject) -> None:
        try:
            data = self._spool.read(kept)
        except NotFound:
            self._spool.drop(kept)  # deleted, or brought by another process, since this round began
            return
        stored = kept.stored
        arguments = stored.key, data, stored.content_type, stored.record
        if kept.overwrite:
            self._calls.call_even_if_down(lambda: self._store.overwrite(*arguments), stored.key)
        elif not self._calls.call_even_if_down(lambda: self._store.create(*arguments), stored.key)[1]:
            _log.warning("another server stored this name meanwhile; the spooled one is dropped", name=stored.key)
        self._spool.drop(kept)

    def _record_failure(self, kept: SpooledObject, why: str) -> bool:
        failed = self._failures.setdefault(kept.path, _FailedUpload())
        failed.tries += 1
        failed.due = time.monotonic() + min(self._poll_seconds * 2**failed.tries, _MAX_BACKOFF_SECONDS)
        _log.warning("the storage does not take this picture yet", name=kept.stored.key, tries=failed.tries, reason=why)
        if failed.tries < _MAX_TRIES:
            return False
        self._spool.reject(kept, why)
        return True
