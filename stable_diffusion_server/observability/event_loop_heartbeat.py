"""Heartbeat file of the event loop, for the watchdog."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

HEARTBEAT_FILE = "event-loop.txt"
_SECONDS = 1.0


class LoopHeartbeat:
    """Touches `path` from the event loop for as long as the block lasts, unless `stalled` names what makes no progress.

    The file holds nothing, so that a full disk takes no touch away, and is removed at the end.
    """

    def __init__(self, path: Path, stalled: Callable[[], list[str]]) -> None:
        self._path = path
        self._stalled = stalled
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Begin to beat."""
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *error: object) -> None:
        """Beat no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_SECONDS)

    async def _run(self) -> None:
        reported: list[str] = []
        try:
            while True:
                stalled = self._stalled()
                if stalled and not reported:
                    _log.error("something makes no progress", what=stalled)
                reported = stalled
                if not stalled:
                    with suppress(OSError):  # no file, no watch: the server is not to end for it
                        self._touch()
                await asyncio.sleep(_SECONDS)
        finally:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _touch(self) -> None:
        try:
            os.utime(self._path)
        except FileNotFoundError:
            self._path.touch()
