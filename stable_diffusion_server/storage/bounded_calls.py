"""Calls a bucket with a time limit, and records outages of reading and writing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from stable_diffusion_server.errors import KeyBusy, ServerError, StorageUnavailable, number_text
from stable_diffusion_server.storage.base import Bucket

_log = structlog.get_logger(__name__)

T = TypeVar("T")

_MAX_CONCURRENT_CALLS = 8


class BoundedCalls:
    """Calls `store` with a `timeout` in seconds, and records outages of "read" and "write". Thread-safe.

    During an outage calls fail at once, until `mark_up`. `outage_event` is set when an outage begins.
    """

    def __init__(self, store: Bucket, timeout: float) -> None:
        self._store = store
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(_MAX_CONCURRENT_CALLS, thread_name_prefix="storage")
        # Separate for "read" and "write", because read-only credentials are possible.
        self._down: dict[str, str] = {}
        # Timed-out writes by key. They may still complete, so no later write of the key may start before.
        self._pending_writes: dict[str, Future[Any]] = {}
        self._probe: Future[None] | None = None
        self.was_up = False
        self.failures = 0
        self.outage_event = threading.Event()

    def outage(self, what: str) -> str | None:
        """Return why "read" or "write" is down, or `None`."""
        return self._down.get(what)

    def call(self, what: str, call: Callable[[], T], writes: str | None = None) -> T:
        """Run `call` and return its result; fail at once during an outage of `what` ("read" or "write").

        `writes` is the key that the call writes. Raises `StorageUnavailable`, and the bucket's errors about a key.
        """
        if (why := self._down.get(what)) is not None:
            raise StorageUnavailable(why, retry_after=30)
        try:
            return self.call_even_if_down(call, writes)
        except KeyBusy:
            raise
        except StorageUnavailable as error:
            self.mark_down(what, error.detail)
            raise

    def call_even_if_down(self, call: Callable[[], T], writes: str | None = None) -> T:
        """Run `call` even during an outage; a failure does not record an outage."""
        try:
            answer = self._pool.submit(call)
        except RuntimeError as error:
            raise StorageUnavailable("The storage is let go.") from error
        return self._result(answer, writes)

    def probe(self) -> None:
        """Raise `StorageUnavailable` unless the bucket is writable now. Concurrent probes share one request."""
        if self._probe is None or self._probe.done():
            try:
                self._probe = self._pool.submit(self._store.open)
            except RuntimeError as error:
                raise StorageUnavailable("The storage is let go.") from error
        self._result(self._probe, None)
        self.was_up = True

    def has_pending_write(self, key: str) -> bool:
        """Return whether a timed-out write of this key still runs."""
        late = self._pending_writes.get(key)
        if late is None or not late.done():
            return late is not None
        self._pending_writes.pop(key, None)
        return False

    def mark_down(self, what: str, why: str) -> None:
        """Record an outage."""
        self.failures += 1
        if what not in self._down:
            _log.error("the storage is down", to=what, reason=why)
            self._down[what] = why
            self.outage_event.set()
        self._down[what] = why

    def mark_up(self, what: str) -> None:
        """Record the end of an outage."""
        if self._down.pop(what, None) is not None:
            _log.info("the storage is up again", to=what)

    def close(self) -> None:
        """Start no more calls; running calls continue."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, answer: Future[T], writes: str | None) -> T:
        try:
            return answer.result(self._timeout)
        except ServerError:
            raise
        except TimeoutError as error:
            if writes is not None and not answer.cancel() and not answer.done():
                self._pending_writes[writes] = answer
            raise StorageUnavailable(
                f"The storage did not answer within {number_text(self._timeout)} seconds.", retry_after=30
            ) from error
        except Exception as error:
            _log.exception("the storage's client failed")
            raise StorageUnavailable(
                f"The storage's answer cannot be understood ({type(error).__name__}).", retry_after=30
            ) from error
