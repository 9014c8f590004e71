"""Tells whether accepted jobs make progress: each ends in its time, and what tends them goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stable_diffusion_server.concurrency import ProgressMonitor

# Each job ends by its deadline; beyond it and this much more it does not end at all.
_SLACK = 30.0


class WorkerProgress:
    """Watches that each running job ends within `max_seconds`, and that the background tasks run."""

    def __init__(self, max_seconds: float) -> None:
        self._monitor = ProgressMonitor(max_seconds + _SLACK)
        self._tasks: Sequence[asyncio.Task[None]] = ()
        self.working = self._monitor.track

    def watch_over(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Take it for a fault when one of those ends; none are watched any more when there are none."""
        self._tasks = tasks

    def health(self) -> str | None:
        """Why accepted jobs make no progress, in a sentence; `None` while all is well."""
        if silent := self._monitor.stalled_seconds():
            count = self._monitor.pending
            return f"Accepted jobs make no progress: {count} are under way, and none ended in {silent:.0f} seconds."
        if any(task.done() for task in self._tasks):
            return "Accepted jobs make no progress: what tends them has ended, and the log says why."
        return None
