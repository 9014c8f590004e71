"""Converts requests, outcomes and rows of the job store to JSON and back; a damaged row becomes a failed job."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from enum import StrEnum
from typing import Any

import structlog

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.jobs.store.records import JobPayload, JobRecord, JobState, RecordedResponse, StoredProblem
from stable_diffusion_server.types import (
    Caller,
    ControlKind,
    ControlMode,
    ControlResize,
    ControlUnit,
    DetailRepair,
    Extension,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    ImagePrompt,
    MaskMode,
    PromptSyntax,
    RequestWarning,
    Task,
    Tiling,
    digest,
)

VERSION = 1
# Errors that decoding raises for foreign data; `RecursionError` if it is nested too deep.
DECODE_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_PICTURES, _REFERENCES = ("image", "mask"), "references"
# Fields of pairs, which JSON has as lists.
_PAIRS = ("loras", "lora_parts", "extra", "sampling", "hires_loras")
_CHOICES: dict[str, type[StrEnum]] = {
    **{"task": Task, "format": Format, "fit": Fit, "fill": Fill},
    "prompt_syntax": PromptSyntax,
    "tiling": Tiling,
    "mask_mode": MaskMode,
}
_PARTS = {"controls": ControlUnit, "image_prompts": ImagePrompt, "repairs": DetailRepair}
_PROMPTS = ("prompts", "negative_prompts")
_CONTROL_CHOICES: dict[str, type[StrEnum]] = {"kind": ControlKind, "mode": ControlMode, "resize": ControlResize}
# Problem types that earlier versions stored under another name.
_RENAMED_KINDS = {"ends-the-server": "poison-job"}
_log = structlog.get_logger(__name__)
COLUMNS = (
    "id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base, webhook_url, outcome, share, bytes, "
    "deaths, kills, form"
)
_DAMAGED = StoredProblem.from_error(ServerError("What was written down of this job is damaged; ask again."))
# Latest valid time in seconds since the epoch (year 5138).
_LATEST = 1e11
_ENDED = tuple(state for state in JobState if state.ended)
_MOST_COUNTED = 2**31


def dump_request(request: GenerationRequest) -> str:
    """Encode a request as JSON, without its files and without fields that have their default."""
    values: dict[str, Any] = {"version": VERSION}
    for part in fields(GenerationRequest):
        value = getattr(request, part.name)
        if part.default is not MISSING and value == part.default:
            continue
        if part.name == _REFERENCES:
            value = [_written_source(source) for source in value]
        elif part.name in _PARTS:
            value = [_written_part(one) for one in value]
        values[part.name] = _written_source(value) if part.name in _PICTURES else value
    return json.dumps(values)


def _written_part(part: ControlUnit | ImagePrompt | DetailRepair) -> dict[str, object]:
    """Encode a part of a request without fields that have their default."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    values = {field.name: values[field.name] for field in fields(part) if values[field.name] != field.default}
    return {name: _written_source(value) if isinstance(value, ImageInput) else value for name, value in values.items()}


def _read_part(name: str, written: Mapping[str, Any], files: Mapping[str, bytes]) -> Any:
    values = {**written}
    values |= {field: choice(values[field]) for field, choice in _CONTROL_CHOICES.items() if field in values}
    values |= {field: _read_source(values[field], files) for field in _PICTURES if field in values}
    values |= {field: tuple(values[field]) for field in _PROMPTS if field in values}
    values |= {"options": tuple((key, value) for key, value in values["options"])} if "options" in values else {}
    return _PARTS[name](**values)


def _written_source(source: ImageInput) -> dict[str, object]:
    of_a_mask = {"transparency": source.transparency, "inverted": source.inverted}
    return {"parameter": source.parameter, "url": source.url, **of_a_mask}


def _read_source(written: Mapping[str, Any], files: Mapping[str, bytes]) -> ImageInput:
    source = ImageInput(**written)
    return source if source.url is not None else replace(source, data=files[source.parameter])


def payload_files(payload: JobPayload) -> dict[str, bytes]:
    """Return the files of a request, uploaded or fetched, by parameter."""
    sent = {source.parameter: source.data for source in payload.request.sources if source.data is not None}
    return {**sent, **payload.fetched}


def payload_bytes(payload: JobPayload) -> int:
    """Return the bytes that a job's request and files use in the job store."""
    return len(dump_request(payload.request)) + sum(map(len, payload_files(payload).values()))


def fingerprint(route: str, request: GenerationRequest) -> str:
    """Return a digest that identifies a request with an idempotency key. Slow for large files: it hashes them."""
    sent = {source.parameter: source.data for source in request.sources if source.data is not None}
    files = {parameter: hashlib.sha256(data).hexdigest() for parameter, data in sent.items()}
    return digest({"route": route, "request": dump_request(request), "files": files})


def load_payload(text: str, files: Mapping[str, bytes]) -> JobPayload:
    """Decode a stored request with its files. Raises `ServerError` if another version wrote it."""
    values = json.loads(text)
    known = {part.name for part in fields(GenerationRequest)}
    if values.pop("version") != VERSION or not values.keys() <= known:
        raise ServerError("This job was accepted by another version of the server, which wrote it differently.")
    values |= {name: choice(values[name]) for name, choice in _CHOICES.items() if name in values}
    values |= {name: tuple((key, value) for key, value in values[name]) for name in _PAIRS if name in values}
    values |= {name: tuple(values[name]) for name in ("styles",) if name in values}
    values |= {name: _read_source(values[name], files) for name in _PICTURES if name in values}
    values |= {"extend": Extension(*values["extend"])} if "extend" in values else {}
    if _REFERENCES in values:
        values[_REFERENCES] = tuple(_read_source(source, files) for source in values[_REFERENCES])
    for name in _PARTS.keys() & values.keys():
        values[name] = tuple(_read_part(name, part, files) for part in values[name])
    request = GenerationRequest(**values)
    remote = {source.parameter for source in request.sources if source.url is not None}
    return JobPayload(request, {name: data for name, data in files.items() if name in remote})


def dump_outcome(outcome: GenerationResult | StoredProblem | None) -> str | None:
    """Encode an outcome as JSON."""
    if outcome is None:
        return None
    return json.dumps({"version": VERSION, "receipt": isinstance(outcome, GenerationResult), **asdict(outcome)})


def load_outcome(text: str | None) -> GenerationResult | StoredProblem | None:
    """Decode a stored outcome. Fields that an older version did not write get their default."""
    if text is None:
        return None
    values = json.loads(text)
    kind = GenerationResult if values.pop("receipt") else StoredProblem
    known = {part.name for part in fields(kind)}
    values = {name: value for name, value in values.items() if name in known}
    if kind is GenerationResult:
        values["warnings"] = tuple(RequestWarning(**warning) for warning in values["warnings"])
        return GenerationResult(**values)
    values["kind"] = _RENAMED_KINDS.get(values["kind"], values["kind"])
    values["faults"] = tuple((name, sentence) for name, sentence in values["faults"])
    return StoredProblem(**values)


class DamagedRow(ValueError):
    """A row with a value that the store never writes; the message names the column."""


def parse_job(row: tuple[Any, ...]) -> JobRecord:
    """Parse a row into a job. Raises `DamagedRow`."""
    job_id, caller, prefix, state, accepted_at, attempts, deadline, ended_at, base_url, webhook_url, outcome, *more = (
        row
    )
    share, size, crashes, kills, form = more
    for name, text in (
        ("id", job_id),
        ("caller", caller),
        ("prefix", prefix),
        ("base", base_url),
        ("share", share),
        ("form", form),
    ):
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
        form=form,
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
            form=row[-1] if isinstance(row[-1], str) else "",
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
