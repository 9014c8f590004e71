"""JSON bodies of the native API. OpenAPI derives its schemas from these types, and drops `Body` from their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NotRequired,  # pydantic rejects typing.TypedDict before Python 3.12
)

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema
from typing_extensions import TypedDict

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.jobs import JobStatus
from stable_diffusion_server.types import GenerationResult

_ALL_REQUIRED = ConfigDict(json_schema_serialization_defaults_required=True)
_RESULT_FIELDS = tuple(part.name for part in fields(GenerationResult))

Uri = Annotated[str, Field(json_schema_extra={"format": "uri"})]


@dataclass(frozen=True)
class SharedSchema:
    """Metadata of a type that Pydantic takes the schema of `body` from, which is built once in a process."""

    body: Any

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        """Return the schema of `body`; both parameters are Pydantic's and unused."""
        return _core_schema_of(self.body)


@lru_cache(128)
def _core_schema_of(body: Any) -> CoreSchema:
    return TypeAdapter(body).core_schema


def described(body: Any) -> Any:
    """Return a body's type for `responses={200: {"model": …}}`.

    FastAPI builds the schemas of all responses twice for each app, which took three quarters of `create_app` and of the
    first request.
    """
    return Annotated[Any, SharedSchema(body)]


def _is_none(value: object) -> bool:
    return value is None


class WarningBody(TypedDict):
    """A code for programs and a sentence for people."""

    code: str
    message: str


class FieldErrorBody(TypedDict):
    """What is wrong with one parameter."""

    field: str
    detail: str


class StoredProblemBody(TypedDict):
    """Why a job failed, as a problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    # `exclude_if` keeps these optional where JobStatusBody requires all defaults.
    field: NotRequired[Annotated[str, Field(exclude_if=_is_none)]]
    errors: NotRequired[Annotated[list[FieldErrorBody], Field(exclude_if=_is_none)]]


class ProblemBody(StoredProblemBody):
    """A problem document (RFC 9457)."""

    request_id: str


class OpenAIErrorDetailsBody(TypedDict):
    """What is wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(TypedDict):
    """An error as OpenAI's clients read it."""

    error: OpenAIErrorDetailsBody


class Automatic1111ErrorBody(TypedDict):
    """An error as AUTOMATIC1111's clients read it. `errors` is an empty text, or what is wrong with each parameter."""

    error: str
    detail: str
    body: str
    errors: Literal[""] | list[FieldErrorBody]
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResultBody(GenerationResult):
    """Where the image is and how it was made. `timings` in seconds by stage.

    `batched`: it shared forward passes; null where that is unknown. `stored` is false until the bucket has the image.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _ALL_REQUIRED

    path: Uri
    prompt_used: Annotated[str | None, Field(exclude_if=_is_none)] = None
    seed_text: Annotated[str | None, Field(exclude_if=_is_none)] = None


class ReplayComparisonBody(TypedDict):
    """How the new image compares with the old one. `decibels`: peak signal-to-noise ratio, null for equal images."""

    same_order: bool
    equal: bool
    decibels: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResultBody(GenerationResultBody):
    """An image that was generated again, and how it compares with the one that was sent."""

    replay: ReplayComparisonBody


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatusBody(JobStatus):
    """A job, with its result or its problem once it has ended.

    Times are in seconds since 1970, UTC; `position` counts the jobs before it. `loading` is the loaded part of its
    model in per cent while the model is being loaded, otherwise null.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _ALL_REQUIRED

    outcome: SkipJsonSchema[None] = None
    form: SkipJsonSchema[str] = ""
    receipt: Annotated[GenerationResultBody | None, Field(exclude_if=_is_none)] = None
    problem: Annotated[StoredProblemBody | None, Field(exclude_if=_is_none)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEventBody(JobStatusBody):
    """The data of a server-sent event of a job; of a preview with the image in base64."""

    content_type: Annotated[str | None, Field(exclude_if=_is_none)] = None
    image: Annotated[str | None, Field(exclude_if=_is_none)] = None


class JobListBody(TypedDict):
    """Jobs, newest first."""

    jobs: list[JobStatusBody]


class HistoryEntryBody(TypedDict):
    """An image generated here. `caller` is the name of the API key; `digest` that of the request."""

    path: Uri
    key: str
    prompt: str
    model: str
    task: str
    seed: int
    width: int
    height: int
    caller: str
    drawn_at: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    digest: str
    number: int


class HistoryPageBody(TypedDict):
    """Images, newest first. Send `next` as `before` for the following page; it is null on the last one."""

    pictures: list[HistoryEntryBody]
    next: int | None


class ImageRecordBody(TypedDict):
    """How a stored image was made. `source` says where the record was found."""

    key: str
    source: str
    record: dict[str, object]


class HealthBody(TypedDict):
    """The process is alive."""

    status: str


class LoadedModelBody(TypedDict):
    """A model: origin, placement, size of its weights in bytes, defaults and capabilities.

    `residency` is `unloaded` or `loading` for a model on demand that is not in memory; `bytes` then is the size of its
    files. `parts` says where each part of a model without a folder comes from, within MODELS_DIR. `tasks` are those it
    draws; an edit looks at `max_references` images at most.
    """

    name: str
    folder: str
    parts: dict[str, str]
    revision: str
    device: str
    dtype: str
    residency: str
    quantization: str
    bytes: int
    follows_edges: bool
    loras: list[str]
    unusable_loras: list[str]
    embeddings: list[str]
    unusable_embeddings: list[str]
    commit: str
    remarks: list[str]
    usual: bool
    family: str
    tasks: list[str]
    max_references: int
    default_steps: int
    default_guidance: float
    native_pixels: int
    takes_negative_prompt: bool
    takes_guidance: bool


class ReadinessBody(TypedDict):
    """Whether the server can generate images. `models` and `remarks` are empty for callers who may not read them."""

    status: str
    missing: list[str]
    models: NotRequired[list[LoadedModelBody]]
    remarks: NotRequired[list[str]]


def result_body(result: GenerationResult, url: str) -> dict[str, object]:
    """Return a result as JSON, with the URL of the image as `path`; `prompt_used` and `seed_text` only if set."""
    # No `asdict`: its deep copy would be most of the cost of a cached response.
    body: dict[str, object] = {"path": url, **{name: getattr(result, name) for name in _RESULT_FIELDS}}
    body["warnings"] = [WarningBody(code=warning.code, message=warning.message) for warning in result.warnings]
    body["timings"] = dict(result.timings)
    for name in ("prompt_used", "seed_text"):
        if body[name] is None:
            del body[name]
    return body


def job_body(job: JobStatus, url: Callable[[str], str]) -> dict[str, object]:
    """Return a job as JSON, with its result (`receipt`) or its problem if it has one; `url` makes the URL of a key."""
    body = asdict(job)
    outcome = job.outcome
    del body["outcome"], body["form"]
    if isinstance(outcome, GenerationResult):
        body["receipt"] = result_body(outcome, url(outcome.key))
    elif outcome is not None:
        body["problem"] = problem_body(outcome.as_error())
    return body


def problem_body(error: ServerError) -> StoredProblemBody:
    """Return an error as the members of a problem document, without the id of a request."""
    body: StoredProblemBody = {
        "type": f"urn:stable-diffusion-server:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.field:
        body["field"] = error.field
    if error.faults:
        body["errors"] = [FieldErrorBody(field=field, detail=detail) for field, detail in error.faults]
    return body
