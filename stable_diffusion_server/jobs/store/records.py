"""Defines the row types of the job store: job, payload, idempotency claim, recorded response, webhook message."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from stable_diffusion_server.errors import ServerError, error_of_kind
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult


class JobState(StrEnum):
    """Lifecycle state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class StoredProblem:
    """The stored form of a `ServerError` that ended a job without image; `kind` names the error class."""

    kind: str
    detail: str
    field: str | None = None
    faults: tuple[tuple[str, str], ...] = ()
    retry_after: int | None = None

    @classmethod
    def from_error(cls, error: ServerError) -> StoredProblem:
        """Convert an error to its stored form."""
        return cls(error.kind, error.detail, error.field, error.faults, error.retry_after)

    def as_error(self) -> ServerError:
        """Rebuild the error."""
        cause = error_of_kind(self.kind)
        return cause(self.detail, field=self.field, faults=self.faults, retry_after=self.retry_after)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the store holds it. Times are seconds since the epoch; `deadline` is the time when the caller gives up.

    `attempts` counts starts without a recorded end. `base_url` is the address under which the caller reached this
    server; `webhook_url` receives a message about the end. `outcome` is set once the job is done or has failed.
    `share` names the caller whose storage share the job uses, `bytes` is the size of its request and files. `crashes`
    counts the crashes of the process or its device while the job ran, `kills` the kills from outside, as far as known.
    `form` is what the dialect that accepted the job wrote down of it, empty for native jobs.
    """

    id: str
    caller: Caller
    accepted_at: float
    state: JobState = JobState.QUEUED
    attempts: int = 0
    deadline: float | None = None
    ended_at: float | None = None
    base_url: str = ""
    webhook_url: str | None = None
    outcome: GenerationResult | StoredProblem | None = None
    share: str = ""
    bytes: int = field(default=0, compare=False)
    crashes: int = 0
    kills: int = 0
    form: str = ""

    @classmethod
    def of_request(cls, job_id: str, caller: Caller, payload: JobPayload, size: int, base_url: str, form: str) -> Self:
        """Return the record of a job that is accepted now; `size` in bytes, without `form`."""
        now, request = time.time(), payload.request
        return cls(
            id=job_id,
            caller=caller,
            accepted_at=now,
            deadline=None if request.timeout is None else now + request.timeout,
            base_url=base_url,
            webhook_url=request.webhook_url,
            share=caller.share,
            bytes=size + len(form.encode()),
            form=form,
        )


@dataclass(frozen=True, slots=True)
class IdempotencyClaim:
    """An idempotency key of a caller, with the fingerprint of its request; `share`: whose storage share it uses."""

    caller: str
    key: str
    fingerprint: str
    share: str = ""


@dataclass(frozen=True, slots=True)
class RecordedResponse:
    """The response to a key: a job, or the outcome of a synchronous request; neither while that request runs."""

    fingerprint: str
    job_id: str | None = None
    outcome: GenerationResult | StoredProblem | None = None


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """A webhook message about a job. `tries` counts failed tries; `due` is the time of the next one.

    `event` is empty for the end of the job, otherwise the name of an earlier event. `share` names the caller, so that
    callers share the sending capacity fairly. `due` is in seconds since the epoch.
    """

    job_id: str
    url: str
    body: str
    tries: int
    due: float
    share: str = ""
    event: str = ""

    @property
    def id(self) -> str:
        """Id of the message, by which its receiver recognizes a repeated delivery."""
        return f"{self.job_id}.{self.event}" if self.event else self.job_id


@dataclass(frozen=True, slots=True)
class JobPayload:
    """The input of a job: its request, and the files fetched from the URLs in it, by parameter."""

    request: GenerationRequest
    fetched: Mapping[str, bytes] = field(default_factory=dict, repr=False)
