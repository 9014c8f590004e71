"""Attributes a crash of the previous process to jobs, and sorts the jobs for the restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog

from stable_diffusion_server.jobs.store.records import JobRecord, JobState
from stable_diffusion_server.observability import CrashCause, CrashReport

_log = structlog.get_logger(__name__)


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
