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
    """One job in this process. `cancelled` is set by its caller; `settled` once its end is known.

    `due` is its deadline by the clock that never jumps, `None` where it has none. `unstored` counts how often the
    storage did not take its picture.
    """

    entry: JobRecord
    happenings: JobEventLog
    progress: GenerationProgress = field(default_factory=lambda: GenerationProgress(EngineEventKind.QUEUED))
    task: asyncio.Task[Any] | None = None
    cancelled: bool = False
    due: float | None = None
    settled: bool = False
    unstored: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def suspect(self) -> bool:
        """Whether the process has died of itself while it was drawn: then nothing is drawn beside it."""
        return self.entry.deaths > 0

    @property
    def standing(self) -> JobStatus:
        """Where it stands now."""
        return JobStatus.of(self.entry, self.progress)

    def wants_previews(self) -> bool:
        """Whether anyone follows it."""
        return self.happenings.readers > 0

    def news(self, progress: GenerationProgress) -> None:
        """Take note of how far it is."""
        if self.settled:
            return
        waits = progress.kind is EngineEventKind.QUEUED
        # A hundred may follow one effort: nothing is copied that stays the same.
        self.progress = progress if progress.preview is None else replace(progress, preview=None)
        state = JobState.QUEUED if waits else JobState.RUNNING
        if self.entry.state is not state:
            self.entry = replace(self.entry, state=state)
        self.happenings.add("queued" if waits else "step", self.standing)
        if progress.preview is not None:
            self.happenings.add("preview", self.standing, progress.preview)

    def waits(self, position: int, eta_seconds: float | None) -> None:
        """Take note of the jobs before it; told to those who follow it."""
        if (position, eta_seconds) != (self.progress.position, self.progress.eta_seconds):
            self.progress = GenerationProgress(EngineEventKind.QUEUED, position=position, eta_seconds=eta_seconds)
            if self.happenings.readers:
                self.happenings.add("queued", self.standing)

    def end(self, state: JobState, at: float, outcome: GenerationResult | StoredProblem | None) -> JobRecord:
        """Note how it ended; the entry to be written down. Nothing changes that any more."""
        self.settled = True
        self.entry = replace(self.entry, state=state, ended_at=at, outcome=outcome)
        return self.entry

    def tell_end(self) -> None:
        """Let those who follow it, and those who wait, know that it ended."""
        self.happenings.add(self.entry.state.value, self.standing)
        self.ended.set()
