"""Streams of server-sent events while images are generated: previews, and each image when it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog
from fastapi.sse import format_sse_event

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import GenerationProgress

_log = structlog.get_logger(__name__)

# Seconds without events before a comment is sent, so that proxies do not close an idle connection.
_KEEP_ALIVE_SECONDS = 15.0
_KEEP_ALIVE = format_sse_event(comment="still drawing")


class PartialImages:
    """Chooses which previews of an image are sent: `wanted` of them, evenly over its steps."""

    def __init__(self, wanted: int, send: Callable[[int, Pixels], None]) -> None:
        self._wanted = wanted
        self._send = send
        self._sent = 0

    def watch(self, progress: GenerationProgress) -> None:
        """Send the preview in `progress` if it is due."""
        if progress.preview is None or progress.steps == 0 or self._sent >= self._wanted:
            return
        if progress.step * (self._wanted + 1) >= (self._sent + 1) * progress.steps and progress.step < progress.steps:
            self._send(self._sent, progress.preview)
            self._sent += 1


class EventStream:
    """Passes events from a background task to one reader; when the reader stops, the task is cancelled."""

    def __init__(self, error_event: Callable[[ServerError], bytes]) -> None:
        self._events: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._error_event = error_event
        self._begun = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def send(self, event: bytes) -> None:
        """Send an event."""
        self._events.put_nowait(event)
        self.begin()

    def begin(self) -> None:
        """Begin the response: later errors are sent as an event, because the status has been sent."""
        self._begun.set()

    async def start(self, work: Coroutine[Any, Any, None]) -> bool:
        """Start the work and wait until the response can begin. Return false if it was stopped before that.

        Raises the error if the work fails before that.
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

    async def read(self) -> AsyncIterator[bytes]:
        """Yield the events, and comments while there are none."""
        try:
            while True:
                try:
                    async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                        event = await self._events.get()
                except TimeoutError:
                    yield _KEEP_ALIVE
                    continue
                if event is None:
                    return
                yield event
        finally:
            self.stop()

    def stop(self) -> None:
        """Cancel the work."""
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, ServerError):
                _log.error("unexpected error in a stream", exc_info=error)
                error = ServerError("An unexpected error happened; the log has more.")
            self._events.put_nowait(self._error_event(error))
        self._events.put_nowait(None)
