"""Background thread that uploads spooled images, and skips images that the bucket rejects."""

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
# With backoff from 1 s on this is about 15 minutes in which the bucket accepted other images.
_MAX_TRIES = 10


@dataclass(slots=True)
class _FailedUpload:
    """Failed tries of one object while the store accepted others; `due`: time of the next try (monotonic seconds)."""

    tries: int = 0
    due: float = 0.0


class SpoolUploader:
    """A thread that polls the spool every `poll_seconds`, with exponential backoff during an outage.

    If an object fails while the store accepts others, the thread retries it with a separate backoff and moves it to
    the dead letters after 10 tries; it moves a rejected object at once. It uploads objects of one key in order.
    """

    def __init__(self, store: Bucket, spool: UploadSpool, calls: BoundedCalls, poll_seconds: float) -> None:
        self._store = store
        self._spool = spool
        self._calls = calls
        self._poll_seconds = poll_seconds
        self._failures: dict[Path, _FailedUpload] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        # Held during each upload.
        self.upload_lock = threading.Lock()

    @property
    def started(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Start no more uploads; wait up to `seconds` for the current one."""
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
            # Probe both separately, so that a read-only bucket becomes readable again after an outage.
            well = [self._succeeds("read", self._probe_read), self._succeeds("write", self._upload_queued)]
            poll_seconds = self._poll_seconds if all(well) else min(2 * poll_seconds, _MAX_POLL_SECONDS)

    def _succeeds(self, what: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except ServerError as error:
            self._calls.mark_down(what, error.detail)
        except Exception:
            _log.exception("the uploader failed unexpectedly and continues")
        else:
            return True
        return False

    def _probe_read(self) -> None:
        if self._calls.outage("read") is None:
            return
        with suppress(InvalidInput, NotFound):  # the store answered
            self._calls.call_even_if_down(lambda: self._store.stat("?"))
        self._calls.mark_up("read")

    def _upload_queued(self) -> None:
        """Upload the spooled objects. Raises `StorageUnavailable` if the store is down."""
        self._spool.enqueue_retried()
        if self._calls.outage("write") is not None:
            self._calls.probe()
            self._calls.mark_up("write")
        waiting = self._spool.waiting()
        self._failures = {
            spooled.path: self._failures[spooled.path] for spooled in waiting if spooled.path in self._failures
        }
        oldest: dict[str, SpooledObject] = {}
        for spooled in waiting:
            oldest.setdefault(spooled.stored.key, spooled)
        # Objects without failures first.
        waiting.sort(key=lambda spooled: (oldest[spooled.stored.key].path in self._failures, spooled.path))
        blocked_keys: set[str] = set()
        for spooled in waiting:
            if self._stop:
                return
            if spooled.stored.key not in blocked_keys and not self._try_upload(spooled):
                blocked_keys.add(spooled.stored.key)

    def _try_upload(self, spooled: SpooledObject) -> bool:
        """Upload an object if it is due; return whether the next object of its key may follow."""
        failed = self._failures.get(spooled.path)
        if failed is not None and time.monotonic() < failed.due:
            return False
        with self.upload_lock:
            if self._calls.has_pending_write(spooled.stored.key):
                return False
            try:
                self._upload(spooled)
            except (InvalidInput, StorageRefused) as error:
                self._spool.reject(spooled, error.detail)
            except StorageUnavailable as error:
                if not isinstance(error, KeyBusy):
                    self._calls.probe()  # raises if the whole store is down, not only this object
                return self._record_failure(spooled, error.detail)
        return True

    def _upload(self, spooled: SpooledObject) -> None:
        try:
            data = self._spool.read(spooled)
        except NotFound:
            self._spool.drop(spooled)  # deleted, or uploaded by another process, since this round began
            return
        stored = spooled.stored
        arguments = stored.key, data, stored.content_type, stored.record
        if spooled.overwrite:
            self._calls.call_even_if_down(lambda: self._store.overwrite(*arguments), stored.key)
        elif not self._calls.call_even_if_down(lambda: self._store.create(*arguments), stored.key)[1]:
            _log.warning("another server stored this name meanwhile; the spooled one is dropped", name=stored.key)
        self._spool.drop(spooled)

    def _record_failure(self, spooled: SpooledObject, why: str) -> bool:
        failed = self._failures.setdefault(spooled.path, _FailedUpload())
        failed.tries += 1
        failed.due = time.monotonic() + min(self._poll_seconds * 2**failed.tries, _MAX_BACKOFF_SECONDS)
        _log.warning(
            "the storage does not take this picture yet", name=spooled.stored.key, tries=failed.tries, reason=why
        )
        if failed.tries < _MAX_TRIES:
            return False
        self._spool.reject(spooled, why)
        return True
