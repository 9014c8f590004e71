"""Job ids: scoped by caller inside the server, shown to callers without that scope."""

from __future__ import annotations

import secrets
from dataclasses import replace

from stable_diffusion_server.errors import RequestInProgress
from stable_diffusion_server.jobs.events import JobStatus
from stable_diffusion_server.jobs.store.records import JobRecord
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import Caller


def new_job_id(prefix: str) -> str:
    """An id with 128 random bits: an unguessable id is all that protects an anonymous caller's job."""
    return prefix + secrets.token_urlsafe(16)


def scope_job_id(job_id: str, caller: Caller) -> str:
    """`OWNER:ID` for an id chosen by a caller with an API key, so that callers may choose the same ids."""
    return f"{caller.owner}:{job_id}" if caller.owner else job_id


def duplicate_job_id_error() -> RequestInProgress:
    """The error for a job id that the caller uses already."""
    return RequestInProgress("There is a job of this id already.", field="X-Job-ID")


def visible_status(caller: Caller, found: JobHandle | JobRecord) -> JobStatus:
    """The status as `caller` sees it: own jobs by their id, jobs of other callers by the scoped id, which is unique."""
    record = found.record if isinstance(found, JobHandle) else found
    status = found.status if isinstance(found, JobHandle) else JobStatus.from_record(found)
    return status if record.caller.owner == caller.owner else replace(status, id=record.id)
