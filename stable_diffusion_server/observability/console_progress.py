"""Shows the progress of generations: a console progress bar, and a heartbeat file for the watchdog."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from tqdm import tqdm

from stable_diffusion_server.files import quarantine
from stable_diffusion_server.types import EngineEvent, EngineEventKind

Observer = Callable[[EngineEvent], None]

# The file has a resolution of 1 s and its reader waits many seconds; more frequent writes took 3 of 70 ms per image.
_MIN_INTERVAL_SECONDS = 0.25

_FINAL_EVENTS = (EngineEventKind.DONE, EngineEventKind.FAILED, EngineEventKind.CANCELLED)


class ConsoleProgress:
    """One progress bar over the steps of all running requests; silent if the stream is not a terminal."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm[None] | None = None
        self._left: dict[str, int] = {}

    def observe(self, event: EngineEvent) -> None:
        """Advance the bar; close it when no request runs."""
        if event.kind is EngineEventKind.STARTED:
            self._start(event)
        elif event.kind is EngineEventKind.STEP and self._bar is not None:
            self._left[event.job_id] = event.steps - event.step
            self._bar.update()
        elif event.kind in _FINAL_EVENTS:
            self._end(event)

    def _start(self, event: EngineEvent) -> None:
        if self._bar is None:
            self._bar = tqdm(total=0, desc="drawing", unit="step", file=self._stream, disable=None, leave=False)
        self._left[event.job_id] = event.steps
        self._bar.total = (self._bar.total or 0) + event.steps
        self._bar.set_description(f"drawing {len(self._left)}")

    def _end(self, event: EngineEvent) -> None:
        self._left.pop(event.job_id, None)
        if not self._left and self._bar is not None:
            self._bar.close()
            self._bar = None


class ProgressHeartbeat:
    """Writes `progress.txt` when the device makes progress, so that a watchdog can detect a hang.

    Line 1 is the time of day (UTC, HH:MM:SS), as users of the file expect; line 2 is the number of active jobs. With
    active jobs it is written at most four times per second.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._active: set[str] = set()
        self._started: set[str] = set()
        self._written = -math.inf

    def observe(self, event: EngineEvent) -> None:
        """Write the file if the event is a heartbeat, which means progress of the device.

        Queueing and leaving the queue do not count as a heartbeat: a hung device with a full queue must look hung. The
        first arrival and the last departure do, since they start and stop the watch.
        """
        idle, waited = not self._active, event.job_id not in self._started
        if event.kind in _FINAL_EVENTS:
            self._active.discard(event.job_id)
            self._started.discard(event.job_id)
        else:
            self._active.add(event.job_id)
            if event.kind is not EngineEventKind.QUEUED:
                self._started.add(event.job_id)
        came_or_left = event.kind is EngineEventKind.QUEUED or (event.kind in _FINAL_EVENTS and waited)
        turns = idle or not self._active
        now = time.monotonic()
        if turns or (not came_or_left and now - self._written >= _MIN_INTERVAL_SECONDS):
            self._written = now
            self._write(time.strftime("%H:%M:%S\n", time.gmtime()) + f"{len(self._active)}\n")

    def _write(self, text: str) -> None:
        try:
            self._path.write_text(text)
        except IsADirectoryError:
            quarantine(self._path, "it is a folder")
            self._path.write_text(text)


def broadcast(observers: Iterable[Observer]) -> Observer:
    """Return one observer that forwards each event to several observers, in order."""
    targets = tuple(observers)

    def observe(event: EngineEvent) -> None:
        for observer in targets:
            observer(event)

    return observe
