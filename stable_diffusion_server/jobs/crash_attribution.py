"""Which jobs a death of the process is counted against, and in what order they are drawn after it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog

from stable_diffusion_server.jobs.store.records import JobRecord, JobState
from stable_diffusion_server.observability import CrashCause, CrashReport

_log = structlog.get_logger(__name__)


def attribute_crash(entries: Sequence[JobRecord], death: CrashReport) -> list[JobRecord]:
    """The jobs that have not ended, with the last death counted; innocent ones first, each group in its order.

    A death the process brought on itself counts against the jobs that were on the device, which makes them suspects
    that are drawn alone; one from outside proves nothing, and is counted apart.
    """
    counted = [_counted(entry, entries, death) for entry in entries]
    if death.on_device or death.cause is CrashCause.OWN:
        suspects = [entry.id for entry in counted if entry.deaths]
        _log.warning(
            "the server died while it drew", cause=death.cause, reason=death.reason, suspects=", ".join(suspects[:8])
        )
    return sorted(counted, key=lambda entry: (entry.deaths, entry.id in death.on_device))


def _counted(entry: JobRecord, entries: Sequence[JobRecord], death: CrashReport) -> JobRecord:
    here = entry.id in death.on_device
    if death.cause is CrashCause.OUTSIDE:
        return replace(entry, kills=entry.kills + 1) if here else entry
    if death.cause is not CrashCause.OWN:
        return entry
    if death.on_device:
        # One that was a suspect had the device for itself; were it not so, nothing would be proved.
        return replace(entry, deaths=entry.deaths + 1) if here and (death.alone or not entry.deaths) else entry
    # With nothing on the device it may have been one that was on its way there, or back.
    in_hand = [other for other in entries if other.state is JobState.RUNNING]
    if entry not in in_hand:
        return entry
    return replace(entry, deaths=entry.deaths + 1 if len(in_hand) == 1 else max(1, entry.deaths))
