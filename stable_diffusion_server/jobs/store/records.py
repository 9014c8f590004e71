"""Row types of the job store: job, payload, idempotency claim, recorded response, webhook message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from stable_diffusion_server.errors import ServerError, error_of_kind
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class StoredProblem:
    """Why a job has no picture, as one of our errors tells it; `kind` names the class."""

    kind: str
    detail: str
    field: str | None = None
    faults: tuple[tuple[str, str], ...] = ()
    retry_after: int | None = None

    @classmethod
    def from_error(cls, error: ServerError) -> StoredProblem:
        """What an error tells."""
        return cls(error.kind, error.detail, error.field, error.faults, error.retry_after)

    def as_error(self) -> ServerError:
        """The error it was."""
        cause = error_of_kind(self.kind)
        return cause(self.detail, field=self.field, faults=self.faults, retry_after=self.retry_after)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it is written down. Times are seconds since the epoch; `deadline` is when its caller gives up.

    `attempts` counts the times it was begun without a recorded end; `base_url` is the address of this server as the
    caller reached it; `webhook_url` is where its end is to be told. `outcome` is there once it is done or has failed.
    `share` is whose room it takes, `bytes` what its order and files are. `crashes` counts the times the process, or
    its device, was lost of itself while the job was there, `kills` those when it was ended from outside, as far as can
    be known.
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
    """An idempotency key of a caller, and what identifies the request it came with; `share`: whose room it takes."""

    caller: str
    key: str
    fingerprint: str
    share: str = ""


@dataclass(frozen=True, slots=True)
class RecordedResponse:
    """What was answered to a key before: a job, or the outcome of a request that waited; neither: it still waits."""

    fingerprint: str
    job_id: str | None = None
    outcome: GenerationResult | StoredProblem | None = None


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """The end of a job on its way to its webhook. `tries` counts those that failed; `due` is the time of the next.

    `share` tells callers apart, who share what sends.
    """

    job_id: str
    url: str
    body: str
    tries: int
    due: float
    share: str = ""


@dataclass(frozen=True, slots=True)
class JobPayload:
    """All that is needed to draw a job: its order, and the files at the addresses in it, by parameter."""

    request: GenerationRequest
    fetched: Mapping[str, bytes] = field(default_factory=dict, repr=False)
