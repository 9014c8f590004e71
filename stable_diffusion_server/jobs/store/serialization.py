"""Converts requests and outcomes to versioned JSON and back; image files are stored separately."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from enum import StrEnum
from typing import Any

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.jobs.store.records import JobPayload, StoredProblem
from stable_diffusion_server.types import (
    Fill,
    Fit,
    Format,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    RequestWarning,
    Task,
    digest,
)

VERSION = 1
# Errors that decoding raises for foreign data; `RecursionError` if it is nested too deep.
DECODE_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_PICTURES = ("image", "mask")
_CHOICES: dict[str, type[StrEnum]] = {"task": Task, "format": Format, "fit": Fit, "fill": Fill}
# Problem types that earlier versions stored under another name.
_RENAMED_KINDS = {"ends-the-server": "poison-job"}


def dump_request(request: GenerationRequest) -> str:
    """Encode a request as JSON, without its files and without fields that have their default."""
    values: dict[str, Any] = {"version": VERSION}
    for part in fields(GenerationRequest):
        value = getattr(request, part.name)
        if part.default is not MISSING and value == part.default:
            continue
        values[part.name] = _written_source(value) if part.name in _PICTURES else value
    return json.dumps(values)


def _written_source(source: ImageInput) -> dict[str, object]:
    of_a_mask = {"transparency": source.transparency, "inverted": source.inverted}
    return {"parameter": source.parameter, "url": source.url, **of_a_mask}


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
    return digest({"door": route, "order": dump_request(request), "files": files})


def load_payload(text: str, files: Mapping[str, bytes]) -> JobPayload:
    """Decode a stored request with its files. Raises `ServerError` if another version wrote it."""
    values = json.loads(text)
    known = {part.name for part in fields(GenerationRequest)}
    if values.pop("version") != VERSION or not values.keys() <= known:
        raise ServerError("This job was accepted by another version of the server, which wrote it differently.")
    values |= {name: choice(values[name]) for name, choice in _CHOICES.items() if name in values}
    if "loras" in values:
        values["loras"] = tuple((name, weight) for name, weight in values["loras"])
    for name in _PICTURES:
        if name in values:
            source = ImageInput(**values[name])
            values[name] = source if source.url is not None else replace(source, data=files[source.parameter])
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
