"""Defines the row types of the job store: job, payload, idempotency claim, recorded response, webhook message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

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
    """A webhook message about the end of a job. `tries` counts failed tries; `due` is the time of the next one.

    `share` names the caller, so that callers share the sending capacity fairly. `due` is in seconds since the epoch.
    """

    job_id: str
    url: str
    body: str
    tries: int
    due: float
    share: str = ""


@dataclass(frozen=True, slots=True)
class JobPayload:
    """The input of a job: its request, and the files fetched from the URLs in it, by parameter."""

    request: GenerationRequest
    fetched: Mapping[str, bytes] = field(default_factory=dict, repr=False)
