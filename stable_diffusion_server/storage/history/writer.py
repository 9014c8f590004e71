"""Writes history entries in a background thread, so that requests do not wait for SQLite."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from queue import Empty, Full, Queue

import structlog

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.storage.history.entries import HistoryEntry, HistoryQuery
from stable_diffusion_server.storage.history.index import HistoryIndex

_log = structlog.get_logger(__name__)

_MAX_QUEUED, _MAX_BATCH = 1000, 100
_FLUSH_SECONDS = 5.0
# One transaction costs the same for one entry as for many, so wait this long for more entries.
_BATCH_SECONDS = 0.1


class HistoryWriter:
    """Queues entries for a `HistoryIndex`; searches first wait for queued entries. No `index`: history is off.

    `record` never fails; `search` raises the index's errors.
    """

    def __init__(self, index: HistoryIndex | None) -> None:
        self._index = index
        self._queue: Queue[HistoryEntry | threading.Event] = Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._stop = threading.Event()
        self._opened = False

    def start(self) -> None:
        """Start the writer thread if it is not running."""
        if self._index is not None and not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """Write the queued entries and stop the thread."""
        if self._thread.is_alive():
            self._flush()
            self._stop.set()
            with suppress(Full):
                self._queue.put_nowait(threading.Event())  # wakes the thread
            self._thread.join(_FLUSH_SECONDS)

    def record(self, entry: HistoryEntry) -> None:
        """Queue an entry. Never blocks and never raises."""
        if self._index is None:
            return
        try:
            self._queue.put_nowait(entry)
        except Full:
            _log.warning("the history queue is full; an image is not recorded", key=entry.key)

    def search(self, query: HistoryQuery) -> list[HistoryEntry]:
        """Return the matching entries, newest first. Blocks; raises `StorageUnavailable`."""
        index = self._flushed_index()
        return index.search(query) if index is not None else []

    def find(self, column: str, value: str) -> HistoryEntry | None:
        """Return the newest entry with this `key` or `digest`. Blocks; `None` also if the index cannot be read."""
        try:
            index = self._flushed_index()
            return index.find(column, value) if index is not None else None
        except ServerError as error:
            _log.warning("the history cannot be read", reason=error.detail)
            return None

    def delete(self, key: str) -> None:
        """Delete the entry of a key. Blocks; logs errors instead of raising them."""
        try:
            index = self._flushed_index()
            if index is not None:
                index.delete(key)
        except ServerError as error:
            _log.warning("a deleted image stays in the history", key=key, reason=error.detail)

    def _flushed_index(self) -> HistoryIndex | None:
        self._flush()
        return self._index

    def _flush(self) -> None:
        """Wait until the queued entries are written, at most 5 s."""
        if not self._thread.is_alive():
            return
        mark = threading.Event()
        try:
            self._queue.put_nowait(mark)
        except Full:
            return
        mark.wait(_FLUSH_SECONDS)

    def _run(self) -> None:
        self._write([])
        while not self._stop.is_set():
            taken = self._next_batch()
            self._write([each for each in taken if isinstance(each, HistoryEntry)])
            for each in taken:
                if isinstance(each, threading.Event):
                    each.set()

    def _next_batch(self) -> list[HistoryEntry | threading.Event]:
        """Collect entries for one transaction: at most 100, for 0.1 s, or until a reader waits."""
        taken = [self._queue.get()]
        until = time.monotonic() + _BATCH_SECONDS
        with suppress(Empty):
            while len(taken) < _MAX_BATCH and not isinstance(taken[-1], threading.Event):
                taken.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
        return taken

    def _write(self, entries: list[HistoryEntry]) -> None:
        assert self._index is not None  # noqa: S101  # the thread runs only with an index
        try:
            if not self._opened:
                self._index.open()
                self._opened = True
            # Of two entries with one key the later describes the stored image.
            if entries:
                self._index.add(list({entry.key: entry for entry in entries}.values()))
        except Exception as error:  # the images are stored; later entries must still be recorded
            self._opened = False
            _log.warning("the history lost entries", count=len(entries), reason=str(error))
