"""Ids of jobs: whose they are, what others are shown of them, and keys that were used before. No I/O."""

from __future__ import annotations

from dataclasses import replace

from stable_diffusion_server.errors import IdempotencyKeyReused, RequestInProgress
from stable_diffusion_server.jobs.events import JobStatus
from stable_diffusion_server.jobs.store.records import IdempotencyClaim, JobRecord, RecordedResponse
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import Caller


def scope_job_id(job_id: str, caller: Caller) -> str:
    """The whole id of a job whose caller chose its id: keys have their own, and know nothing of one another's."""
    return f"{caller.owner}:{job_id}" if caller.owner else job_id


def duplicate_job_id_error() -> RequestInProgress:
    """The error for an id that its caller has given to another job already."""
    return RequestInProgress("There is a job of this id already.", field="X-Job-ID")


def visible_status(caller: Caller, found: JobHandle | JobRecord) -> JobStatus:
    """How a job stands; one of another caller under its whole id, since the other may have chosen its end."""
    record = found.record if isinstance(found, JobHandle) else found
    status = found.status if isinstance(found, JobHandle) else JobStatus.from_record(found)
    return status if record.caller.owner == caller.owner else replace(status, id=record.id)


def check_recorded_response(claim: IdempotencyClaim, before: RecordedResponse) -> RecordedResponse:
    """What a key was answered with.

    Raises `IdempotencyKeyReused` for another request, `RequestInProgress` while nothing is.
    """
    if before.fingerprint != claim.fingerprint:
        raise IdempotencyKeyReused("This key came with another request before.", field="Idempotency-Key")
    if before.job_id is None and before.outcome is None:
        raise RequestInProgress("The request with this key is being answered.", field="Idempotency-Key", retry_after=1)
    return before
