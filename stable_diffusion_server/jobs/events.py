"""What happened to one job, for any number of readers from any point on, in bounded memory."""

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
_NOTHING_YET = GenerationProgress(EngineEventKind.QUEUED)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job stands, as its caller is told. `position` counts the jobs before it; times are since the epoch."""

    id: str
    state: JobState
    accepted_at: float
    ended_at: float | None = None
    attempts: int = 0
    position: int = 0
    eta_seconds: float | None = None
    step: int = 0
    steps: int = 0
    outcome: GenerationResult | StoredProblem | None = None

    @classmethod
    def from_record(cls, record: JobRecord, now: GenerationProgress = _NOTHING_YET) -> JobStatus:
        """What is written down of a job, and how far it is; of one that has ended, how far it came."""
        position, eta = (0, None) if record.state.ended else (now.position, now.eta_seconds)
        told = (record.id.rpartition(":")[2], record.state, record.accepted_at, record.ended_at, record.attempts)
        return cls(*told, position, eta, now.step, now.steps, record.outcome)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event: `queued`, `step`, `preview`, `done`, `failed` or `cancelled`. `id` is where to go on after it.

    `preview` is height × width × 3 uint8, in a preview.
    """

    id: str
    kind: str
    status: JobStatus
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


class JobEventLog:
    """The events of one job in one process, which `epoch` tells from those of an earlier one.

    Of waiting only the last event is kept, and only the last preview.
    """

    def __init__(self, epoch: str) -> None:
        self._epoch = epoch
        self._events: deque[tuple[int, JobEvent]] = deque(maxlen=_MAX_EVENTS)
        self._count = 0
        self._changed = asyncio.Event()
        self._closed = False
        self.readers = 0

    def add(self, kind: str, status: JobStatus, preview: NDArray[np.uint8] | None = None) -> None:
        """Let all readers know. An event of an ended job is its last."""
        self._count += 1
        superseded = kind == "preview" or (kind == "queued" and bool(self._events) and self._events[-1][1].kind == kind)
        if superseded:
            self._events = deque((kept for kept in self._events if kept[1].kind != kind), _MAX_EVENTS)
        over = status.state.ended
        number = FINAL_EVENT_ID if over else f"{self._epoch}.{self._count}"
        self._events.append((self._count, JobEvent(number, kind, status, preview)))
        self._closed |= over
        self._wake()

    def close(self) -> None:
        """Send the readers home, although the job has not ended: they may come back to the next process."""
        self._closed = True
        self._wake()

    async def follow(self, after: str | None, keepalive_seconds: float) -> AsyncGenerator[JobEvent | None]:
        """The events after the one of that id, all of them for an id that is not known here, until the job ends.

        `None` whenever nothing happened for `keepalive_seconds` seconds.
        """
        epoch, _, number = (after or "").partition(".")
        seen = (parse_int(number) or 0) if epoch == self._epoch else 0
        self.readers += 1
        try:
            while True:
                changed, over = self._changed, self._closed
                # One at a time: who reads slowly holds no event that was superseded meanwhile.
                while (following := self._next_after(seen)) is not None:
                    seen = following[0]
                    yield following[1]
                if over:
                    return
                try:
                    async with asyncio.timeout(keepalive_seconds):
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self.readers -= 1

    def _next_after(self, seen: int) -> tuple[int, JobEvent] | None:
        """The first kept event after that number."""
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
    """The last event of a job of which no others are known any more."""
    yield JobEvent(FINAL_EVENT_ID, status.state.value, replace(status))
