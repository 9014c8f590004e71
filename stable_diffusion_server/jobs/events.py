"""Replayable event log of one job, in bounded memory, for any number of readers; types of status and event."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.generation import parse_int
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, StoredProblem
from stable_diffusion_server.types import EngineEventKind, GenerationProgress, GenerationResult

FINAL_EVENT_ID = "end"
_MAX_EVENTS = 600
_NO_PROGRESS = GenerationProgress(EngineEventKind.QUEUED)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's status as its caller sees it. `position` counts the jobs ahead; times are seconds since the epoch.

    `loading` is the loaded part of the job's model in per cent while the model is being loaded, otherwise `None`.
    `form` is what the dialect that accepted the job wrote down of it.
    """

    id: str
    state: JobState
    accepted_at: float
    ended_at: float | None = None
    attempts: int = 0
    position: int = 0
    eta_seconds: float | None = None
    step: int = 0
    steps: int = 0
    loading: int | None = None
    outcome: GenerationResult | StoredProblem | None = None
    form: str = field(default="", repr=False)

    @classmethod
    def from_record(cls, record: JobRecord, progress: GenerationProgress = _NO_PROGRESS) -> JobStatus:
        """Build the status of a stored job and its progress; an ended job keeps its last step and has no position."""
        ended = record.state.ended
        return cls(
            id=record.id.rpartition(":")[2],
            state=record.state,
            accepted_at=record.accepted_at,
            ended_at=record.ended_at,
            attempts=record.attempts,
            position=0 if ended else progress.position,
            eta_seconds=None if ended else progress.eta_seconds,
            step=progress.step,
            steps=progress.steps,
            loading=None if ended or progress.loaded is None else round(100 * progress.loaded),
            outcome=record.outcome,
            form=record.form,
        )


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event: `queued`, `loading`, `step`, `preview`, `done`, `failed` or `cancelled`.

    Streams resume after an event's `id`. `preview` is height × width × 3 uint8; only `preview` events have it.
    """

    id: str
    kind: str
    status: JobStatus
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


class JobEventLog:
    """The latest events of one job. Event ids start with `epoch`, which differs between processes.

    Of consecutive `queued` or `loading` events the log keeps the last one, and of all `preview` events the latest one.
    """

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._events: deque[tuple[int, JobEvent]] = deque(maxlen=_MAX_EVENTS)
        self._count = 0
        self._changed = asyncio.Event()
        self._closed = False
        self.readers = 0

    def add(self, kind: str, status: JobStatus, preview: NDArray[np.uint8] | None = None) -> None:
        """Publish an event. If its status is an ended state, this is the final event."""
        self._count += 1
        repeated = kind in ("queued", "loading") and bool(self._events) and self._events[-1][1].kind == kind
        superseded = kind == "preview" or repeated
        if superseded:
            self._events = deque((event for event in self._events if event[1].kind != kind), _MAX_EVENTS)
        ended = status.state.ended
        event_id = FINAL_EVENT_ID if ended else f"{self._epoch}.{self._count}"
        self._events.append((self._count, JobEvent(event_id, kind, status, preview)))
        self._closed |= ended
        self._wake()

    def close(self) -> None:
        """End all streams although the job has not ended; clients may resume with the next process."""
        self._closed = True
        self._wake()

    async def follow(self, after: str | None, keepalive_seconds: float) -> AsyncGenerator[JobEvent | None]:
        """Yield the events after the one with id `after`, until the job ends; all events if this log lacks that id.

        Yields `None` as a keep-alive after `keepalive_seconds` without an event.
        """
        epoch, _, number = (after or "").partition(".")
        seen = (parse_int(number) or 0) if epoch == self._epoch else 0
        self.readers += 1
        try:
            while True:
                changed, closed = self._changed, self._closed
                # Look up one event at a time, so that a slow reader skips events that were superseded meanwhile.
                while (following := self._next_after(seen)) is not None:
                    seen = following[0]
                    yield following[1]
                if closed:
                    return
                try:
                    async with asyncio.timeout(keepalive_seconds):
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self.readers -= 1

    def _next_after(self, seen: int) -> tuple[int, JobEvent] | None:
        found = None
        for numbered in reversed(self._events):
            if numbered[0] <= seen:
                break
            found = numbered
        return found

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def final_event_only(status: JobStatus) -> AsyncGenerator[JobEvent | None]:
    """Yield the final event of a job whose event log no longer exists."""
    yield JobEvent(FINAL_EVENT_ID, status.state.value, replace(status))
