"""Time limits: a deadline for one block of work, and detection of work that makes no progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from stable_diffusion_server.errors import DeadlineExceeded, number_text


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Cancel the block after `seconds`, and raise `DeadlineExceeded`."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise DeadlineExceeded(f"The picture was not stored within {number_text(seconds)} seconds.") from error


class ProgressMonitor:
    """Detects that pieces of work, each of which should end within `bound` seconds, no longer end.

    Any thread may read it; `track` is used on one event loop.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._pending = 0
        self._last_progress = 0.0

    @property
    def pending(self) -> int:
        """Pieces of work that have begun and not ended."""
        return self._pending

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count the block as one piece of work."""
        if not self._pending:
            self._last_progress = time.monotonic()
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1
            self._last_progress = time.monotonic()

    def stalled_seconds(self) -> float:
        """Seconds since any work ended, if they exceed the bound and there is pending work; otherwise 0."""
        idle = time.monotonic() - self._last_progress
        return idle if self._pending and idle > self._bound else 0.0
