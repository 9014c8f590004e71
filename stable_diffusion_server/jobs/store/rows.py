"""Parses rows of the job store. A damaged row becomes a failed job and does not block other rows."""

from __future__ import annotations

import math
from typing import Any

import structlog

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, RecordedResponse, StoredProblem
from stable_diffusion_server.jobs.store.serialization import DECODE_ERRORS, load_outcome
from stable_diffusion_server.types import Caller

_log = structlog.get_logger(__name__)

COLUMNS = (
    "id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base, webhook_url, outcome, share, bytes, "
    "deaths, kills"
)
_DAMAGED = StoredProblem.from_error(ServerError("What was written down of this job is damaged; ask again."))
# Latest valid time in seconds since the epoch (year 5138).
_LATEST = 1e11
_ENDED = tuple(state for state in JobState if state.ended)
_MOST_COUNTED = 2**31


class DamagedRow(ValueError):
    """A row with a value that the store never writes; the message names the column."""


def parse_job(row: tuple[Any, ...]) -> JobRecord:
    """Parse a row into a job. Raises `DamagedRow`."""
    job_id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base_url, webhook_url, outcome, *more = (
        row
    )
    share, size, crashes, kills = more
    for name, text in (("id", job_id), ("caller", caller), ("prefix", prefix), ("base", base_url), ("share", share)):
        _check(isinstance(text, str), name)
    _check(webhook_url is None or isinstance(webhook_url, str), "webhook_url")
    for name, moment in (("accepted_at", accepted_at), ("deadline", deadline), ("ended_at", ended_at)):
        _check((moment is None and name != "accepted_at") or _is_time(moment), name)
    for name, count in (("attempts", attempts), ("bytes", size), ("deaths", crashes), ("kills", kills)):
        _check(isinstance(count, int) and 0 <= count < _MOST_COUNTED, name)
    _check(state in tuple(JobState), "state")
    _check((ended_at is not None) == JobState(state).ended, "ended_at")
    try:
        stored_outcome = load_outcome(outcome)
    except DECODE_ERRORS as error:
        raise DamagedRow("outcome") from error
    return JobRecord(
        id=job_id,
        caller=Caller.from_owner(caller, prefix),
        accepted_at=accepted_at,
        state=JobState(state),
        attempts=attempts,
        deadline=deadline,
        ended_at=ended_at,
        base_url=base_url,
        webhook_url=webhook_url,
        outcome=stored_outcome,
        share=share,
        bytes=size,
        crashes=crashes,
        kills=kills,
    )


def parse_job_or_failed(row: tuple[Any, ...], now: float) -> JobRecord:
    """Parse a row into a job; a damaged row becomes a failed job. `now`: seconds since the epoch."""
    try:
        return parse_job(row)
    except DamagedRow as damage:
        job_id, caller, prefix = (str(value) for value in row[:3])
        _log.error("what was written down of a job is damaged", job_id=job_id, column=str(damage))
        accepted_at = row[4] if _is_time(row[4]) else now
        # An unfinished job ends now, so that its failure stays available for the retention time.
        ended_at = row[7] if _is_time(row[7]) and row[3] in _ENDED else now
        share = row[11] if isinstance(row[11], str) else ""
        return JobRecord(
            job_id,
            Caller.from_owner(caller, prefix),
            accepted_at,
            JobState.FAILED,
            ended_at=ended_at,
            outcome=_DAMAGED,
            share=share,
        )


def parse_recorded_response(row: tuple[Any, ...]) -> RecordedResponse | None:
    """Parse the response of a key; `None` if it is damaged, so that the client can retry the request."""
    fingerprint, job_id, outcome = row
    try:
        return RecordedResponse(fingerprint, job_id, load_outcome(outcome))
    except DECODE_ERRORS:
        _log.error("what was written down of an idempotency key is damaged")
        return None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < _LATEST


def _check(holds: bool, column: str) -> None:
    if not holds:
        raise DamagedRow(column)
