"""Limits and retention times of jobs, and which job a crash of the process counts against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from stable_diffusion_server.jobs.store.records import JobRecord, JobState
from stable_diffusion_server.observability import CrashCause, CrashReport

# The third crash during a job fails it. After the first crash it runs alone, so later crashes are attributed to it.
MAX_CRASHES = 3
# A kill from outside says nothing about the running job, but this many kills do.
MAX_KILLS = 100
# Seconds until the second, third, … try to deliver a webhook; the last value repeats.
WEBHOOK_BACKOFF = (5.0, 30.0, 120.0, 600.0, 3600.0)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """Limits of waiting and running jobs, retention times of results, and webhook signing.

    `store_bytes` limits the stored bytes of unfinished jobs; every generated job id starts with `id_prefix`. Times are
    in seconds unless the name says hours: `reopen_seconds` is the pause between attempts to open the job store,
    `max_seconds` the time limit of one job.
    """

    max_queued: int = 1000
    store_bytes: int = 1_073_741_824
    concurrency: int = 8
    retention_hours: float = 24.0
    idempotency_hours: float = 24.0
    id_prefix: str = ""
    webhook_secret: str = ""
    webhook_backoff: tuple[float, ...] = WEBHOOK_BACKOFF
    reopen_seconds: float = 5.0
    max_seconds: float = 600.0


def attribute_crash(records: Sequence[JobRecord], death: CrashReport) -> list[JobRecord]:
    """Return the unfinished jobs with updated crash and kill counts; jobs without crashes first (stable order).

    A crash of the process itself increments `crashes` of the jobs that ran on the device; such suspects run alone
    from then on. A kill from outside proves nothing, so it increments `kills` only.
    """
    counted = [_counted(record, records, death) for record in records]
    if death.on_device or death.cause is CrashCause.OWN:
        suspects = [record.id for record in counted if record.crashes]
        _log.warning(
            "the server died while it drew", cause=death.cause, reason=death.reason, suspects=", ".join(suspects[:8])
        )
    return sorted(counted, key=lambda record: (record.crashes, record.id in death.on_device))


def _counted(record: JobRecord, records: Sequence[JobRecord], death: CrashReport) -> JobRecord:
    here = record.id in death.on_device
    if death.cause is CrashCause.OUTSIDE:
        return replace(record, kills=record.kills + 1) if here else record
    if death.cause is not CrashCause.OWN:
        return record
    if death.on_device:
        # A suspect normally runs alone. If it did not, the crash proves nothing, so its count stays.
        return replace(record, crashes=record.crashes + 1) if here and (death.alone or not record.crashes) else record
    # The device was idle, so a job before or after its device work may have caused the crash.
    in_hand = [other for other in records if other.state is JobState.RUNNING]
    if record not in in_hand:
        return record
    return replace(record, crashes=record.crashes + 1 if len(in_hand) == 1 else max(1, record.crashes))
