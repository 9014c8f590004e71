"""Asynchronous jobs: durable store, background worker, event log, idempotency keys, webhooks."""

from __future__ import annotations

from stable_diffusion_server.jobs.events import JobEvent, JobStatus
from stable_diffusion_server.jobs.manager import JobManager
from stable_diffusion_server.jobs.policy import JobPolicy
from stable_diffusion_server.jobs.store.records import (
    IdempotencyClaim,
    JobRecord,
    JobState,
    RecordedResponse,
    StoredProblem,
)
from stable_diffusion_server.jobs.store.serialization import fingerprint
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.tracked_job import JobHandle

__all__ = [
    "IdempotencyClaim",
    "JobEvent",
    "JobHandle",
    "JobManager",
    "JobPolicy",
    "JobRecord",
    "JobState",
    "JobStatus",
    "RecordedResponse",
    "SqliteJobStore",
    "StoredProblem",
    "fingerprint",
]
