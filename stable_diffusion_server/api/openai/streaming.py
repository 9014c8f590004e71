"""Pictures as server-sent events: partial ones while they are drawn, and each when it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import GenerationProgress

_log = structlog.get_logger(__name__)

# Told while nothing else is, so that what lies between does not take the line for dead.
_QUIET_SECONDS = 15.0
_STILL_THERE = ": still drawing\n\n"

Watch = Callable[[GenerationProgress], None]


class PartialImages:
    """Chooses which of a picture's previews are sent: `wanted` of them, evenly over its steps."""

    def __init__(self, wanted: int, send: Callable[[int, Pixels], None]) -> None:
        self._wanted = wanted
        self._send = send
        self._sent = 0

    def watch(self, progress: GenerationProgress) -> None:
        """Take note of how far the picture is."""
        if progress.preview is None or progress.steps == 0 or self._sent >= self._wanted:
            return
        if progress.step * (self._wanted + 1) >= (self._sent + 1) * progress.steps and progress.step < progress.steps:
            self._send(self._sent, progress.preview)
            self._sent += 1


class EventStream:
    """Events from work that goes on beside their reader; whoever stops reading stops the work."""

    def __init__(self, failed: Callable[[ServerError], str]) -> None:
        self._events: asyncio.Queue[str | None] = asyncio.Queue()
        self._failed = failed
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def send(self, event: str) -> None:
        """Send an event."""
        self._events.put_nowait(event)
        self.begin()

    def begin(self) -> None:
        """The work is under way: what goes wrong from here on is told in the stream and not by a status."""
        self._begun.set()

    async def start(self, work: Coroutine[Any, Any, None]) -> bool:
        """Start the work, and wait until it is under way: false if it was stopped before.

        Raises what it fails with before.
        """
        task = self._task = asyncio.create_task(work)
        beginning = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait((task, beginning), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            beginning.cancel()
        if task.done() and not self._begun.is_set():
            if task.cancelled():
                return False
            task.result()
        task.add_done_callback(self._ended)
        return True

    async def read(self) -> AsyncIterator[str]:
        """The events, as they come."""
        try:
            while True:
                try:
                    async with asyncio.timeout(_QUIET_SECONDS):
                        event = await self._events.get()
                except TimeoutError:
                    yield _STILL_THERE
                    continue
                if event is None:
                    return
                yield event
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop the work."""
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, ServerError):
                _log.error("unexpected error in a stream", exc_info=error)
                error = ServerError("An unexpected error happened; the log has more.")
            self._events.put_nowait(self._failed(error))
        self._events.put_nowait(None)
