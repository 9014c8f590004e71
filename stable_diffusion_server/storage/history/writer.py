"""Keeps the history off everyone's way: entries are taken at once and written by a thread. Knows no SQL."""

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

_WAITING, _TOGETHER = 1000, 100
_SETTLE_SECONDS = 5.0
# A transaction costs the same for one entry as for many.
_GATHER_SECONDS = 0.1


class HistoryWriter:
    """The history: what is recorded is found soon after. Without an `index` nothing is kept and nothing found.

    No failure of the index reaches who records; who reads is told of it.
    """

    def __init__(self, index: HistoryIndex | None) -> None:
        self._index = index
        self._queue: Queue[HistoryEntry | threading.Event] = Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)
        self._stop = threading.Event()
        self._opened = False

    def start(self) -> None:
        """Start the thread that writes, if it does not run."""
        if self._index is not None and not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """Write what waits, and end."""
        if self._thread.is_alive():
            self._flush()
            self._stop.set()
            with suppress(Full):
                self._queue.put_nowait(threading.Event())  # wakes it
            self._thread.join(_SETTLE_SECONDS)

    def record(self, entry: HistoryEntry) -> None:
        """Take an entry. Never blocks and never raises."""
        if self._index is None:
            return
        try:
            self._queue.put_nowait(entry)
        except Full:
            _log.warning("the history is behind; a picture is left out of it", key=entry.key)

    def search(self, query: HistoryQuery) -> list[HistoryEntry]:
        """The entries asked for, the newest first. Blocks; raises `StorageUnavailable`."""
        index = self._flushed_index()
        return index.search(query) if index is not None else []

    def find(self, column: str, value: str) -> HistoryEntry | None:
        """The newest entry whose `key` or `digest` is this. Blocks; `None` as well when the index is of no use."""
        try:
            index = self._flushed_index()
            return index.find(column, value) if index is not None else None
        except ServerError as error:
            _log.warning("the history cannot be read", reason=error.detail)
            return None

    def delete(self, key: str) -> None:
        """Keep nothing of this key. Blocks; an index of no use is logged."""
        try:
            index = self._flushed_index()
            if index is not None:
                index.delete(key)
        except ServerError as error:
            _log.warning("a deleted picture stays in the history", key=key, reason=error.detail)

    def _flushed_index(self) -> HistoryIndex | None:
        self._flush()
        return self._index

    def _flush(self) -> None:
        """Wait until what was recorded so far is written, for a moment at the most."""
        if not self._thread.is_alive():
            return
        mark = threading.Event()
        try:
            self._queue.put_nowait(mark)
        except Full:
            return
        mark.wait(_SETTLE_SECONDS)

    def _run(self) -> None:
        self._write([])
        while not self._stop.is_set():
            taken = self._next_batch()
            self._write([each for each in taken if isinstance(each, HistoryEntry)])
            for each in taken:
                if isinstance(each, threading.Event):
                    each.set()

    def _next_batch(self) -> list[HistoryEntry | threading.Event]:
        """What is to be written together: all that comes within a moment, or until someone waits for it."""
        taken = [self._queue.get()]
        until = time.monotonic() + _GATHER_SECONDS
        with suppress(Empty):
            while len(taken) < _TOGETHER and not isinstance(taken[-1], threading.Event):
                taken.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
        return taken

    def _write(self, entries: list[HistoryEntry]) -> None:
        assert self._index is not None  # noqa: S101  # no thread without one; tells the type checker
        try:
            if not self._opened:
                self._index.open()
                self._opened = True
            # One a key: the later of two is the one that is stored.
            if entries:
                self._index.add(list({entry.key: entry for entry in entries}.values()))
        except Exception as error:  # whatever it is: the pictures are stored, and the next ones are to be recorded
            self._opened = False
            _log.warning("the history lost entries", count=len(entries), reason=str(error))
