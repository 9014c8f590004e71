"""A job that has not ended, or one that someone waits for: where it stands, who follows it, how to cancel it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from stable_diffusion_server.jobs.events import JobEventLog, JobStatus
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, StoredProblem
from stable_diffusion_server.types import EngineEventKind, GenerationProgress, GenerationResult


@dataclass(eq=False, slots=True)
class JobHandle:
    """One job in this process. `cancelled` is set by its caller; `finished` once its end is known.

    `expires_at` is its deadline by the clock that never jumps, `None` where it has none. `storage_failures` counts how
    often the storage did not take its picture.
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
        """Whether the process has died of itself while it was drawn: then nothing is drawn beside it."""
        return self.record.crashes > 0

    @property
    def status(self) -> JobStatus:
        """Where it stands now."""
        return JobStatus.from_record(self.record, self.progress)

    def wants_previews(self) -> bool:
        """Whether anyone follows it."""
        return self.events.readers > 0

    def report_progress(self, progress: GenerationProgress) -> None:
        """Take note of how far it is."""
        if self.finished:
            return
        waits = progress.kind is EngineEventKind.QUEUED
        # A hundred may follow one effort: nothing is copied that stays the same.
        self.progress = progress if progress.preview is None else replace(progress, preview=None)
        state = JobState.QUEUED if waits else JobState.RUNNING
        if self.record.state is not state:
            self.record = replace(self.record, state=state)
        self.events.add("queued" if waits else "step", self.status)
        if progress.preview is not None:
            self.events.add("preview", self.status, progress.preview)

    def report_position(self, position: int, eta_seconds: float | None) -> None:
        """Take note of the jobs before it; told to those who follow it."""
        if (position, eta_seconds) != (self.progress.position, self.progress.eta_seconds):
            self.progress = GenerationProgress(EngineEventKind.QUEUED, position=position, eta_seconds=eta_seconds)
            if self.events.readers:
                self.events.add("queued", self.status)

    def end(self, state: JobState, at: float, outcome: GenerationResult | StoredProblem | None) -> JobRecord:
        """Note how it ended; the entry to be written down. Nothing changes that any more."""
        self.finished = True
        self.record = replace(self.record, state=state, ended_at=at, outcome=outcome)
        return self.record

    def publish_end(self) -> None:
        """Let those who follow it, and those who wait, know that it ended."""
        self.events.add(self.record.state.value, self.status)
        self.ended.set()
