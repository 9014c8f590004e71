"""Defines the in-memory handle of an active job: progress, event log, cancellation."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from stable_diffusion_server.jobs.events import JobEventLog, JobStatus
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, StoredProblem
from stable_diffusion_server.types import EngineEventKind, GenerationProgress, GenerationResult


@dataclass(eq=False, slots=True)
class JobHandle:
    """One job in this process.

    `cancelled` is set when the caller cancels, `finished` when the outcome is known, `ended` when followers can see it.
    `expires_at` is the deadline in monotonic seconds. `storage_failures` counts failed uploads of the image.
    """

    record: JobRecord
    events: JobEventLog
    progress: GenerationProgress = field(default_factory=lambda: GenerationProgress(EngineEventKind.QUEUED))
    task: asyncio.Task[Any] | None = None
    cancelled: bool = False
    expires_at: float | None = None
    finished: bool = False
    storage_failures: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def suspect(self) -> bool:
        """Whether the process crashed while this job ran; a suspect runs alone."""
        return self.record.crashes > 0

    @property
    def status(self) -> JobStatus:
        """The current status."""
        return JobStatus.from_record(self.record, self.progress)

    def wants_previews(self) -> bool:
        """Whether a client follows the job's events."""
        return self.events.readers > 0

    def report_progress(self, progress: GenerationProgress) -> None:
        """Update the progress and publish it; ignored once the job is finished."""
        if self.finished:
            return
        waits = progress.kind in (EngineEventKind.QUEUED, EngineEventKind.LOADING)
        # A hundred jobs may share one generation, so do not copy unchanged progress.
        self.progress = progress if progress.preview is None else replace(progress, preview=None)
        state = JobState.QUEUED if waits else JobState.RUNNING
        if self.record.state is not state:
            self.record = replace(self.record, state=state)
        self.events.add(progress.kind.value if waits else "step", self.status)
        if progress.preview is not None:
            self.events.add("preview", self.status, progress.preview)

    def report_position(self, position: int, eta_seconds: float | None) -> None:
        """Update the number of jobs ahead and the estimate; publish it only if the job has followers."""
        if (position, eta_seconds) != (self.progress.position, self.progress.eta_seconds):
            self.progress = GenerationProgress(EngineEventKind.QUEUED, position=position, eta_seconds=eta_seconds)
            if self.events.readers:
                self.events.add("queued", self.status)

    def finish(self, state: JobState, at: float, outcome: GenerationResult | StoredProblem | None) -> JobRecord:
        """Set the final outcome and return the record to store. `at`: seconds since the epoch."""
        self.finished = True
        self.record = replace(self.record, state=state, ended_at=at, outcome=outcome)
        return self.record

    def publish_end(self) -> None:
        """Notify followers and waiting callers that the job has ended."""
        self.events.add(self.record.state.value, self.status)
        self.ended.set()
