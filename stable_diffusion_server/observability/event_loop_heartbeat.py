"""Touches a heartbeat file from the event loop, for the watchdog."""

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
    """Touches `path` every second from the event loop inside an `async with` block, unless `stalled` returns names.

    `stalled` returns what makes no progress. The file is empty, so that a full disk prevents no touch; the end of the
    block removes it.
    """

    def __init__(self, path: Path, stalled: Callable[[], list[str]]) -> None:
        self._path = path
        self._stalled = stalled
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Start the heartbeat."""
        self._task = asyncio.create_task(self._run())

    async def __aexit__(self, *error: object) -> None:
        """Stop the heartbeat and remove the file."""
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
                    with suppress(OSError):  # without the file the watchdog does not watch; the server continues
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
