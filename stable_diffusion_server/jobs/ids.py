"""Creates and scopes job ids: inside the server an id includes its owner; callers see it without the owner."""

from __future__ import annotations

import secrets
from dataclasses import replace

from stable_diffusion_server.errors import RequestInProgress
from stable_diffusion_server.jobs.events import JobStatus
from stable_diffusion_server.jobs.store.records import JobRecord
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import Caller


def new_job_id(prefix: str) -> str:
    """Return an id with 128 random bits: the unguessable id is the only protection of an anonymous caller's job."""
    return prefix + secrets.token_urlsafe(16)


def scope_job_id(job_id: str, caller: Caller) -> str:
    """Return `OWNER:ID` for a caller with an API key, so that two callers can choose the same id."""
    return f"{caller.owner}:{job_id}" if caller.owner else job_id


def duplicate_job_id_error() -> RequestInProgress:
    """Return the error for a job id that is already in use."""
    return RequestInProgress("There is a job of this id already.", field="X-Job-ID")


def visible_status(caller: Caller, found: JobHandle | JobRecord) -> JobStatus:
    """Return the status as `caller` sees it: own jobs with the plain id, other callers' jobs with the scoped id."""
    record = found.record if isinstance(found, JobHandle) else found
    status = found.status if isinstance(found, JobHandle) else JobStatus.from_record(found)
    return status if record.caller.owner == caller.owner else replace(status, id=record.id)
