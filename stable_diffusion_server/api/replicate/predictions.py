"""Predictions as Replicate's clients read them: what is stored with a job, and the JSON of a job and its webhooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from stable_diffusion_server.api.base64_images import is_data_url
from stable_diffusion_server.errors import NotFound
from stable_diffusion_server.jobs import JobRecord, JobState, JobStatus, StoredProblem
from stable_diffusion_server.parsing import dumps
from stable_diffusion_server.types import GenerationResult

WebhookEvent = Literal["start", "output", "logs", "completed"]
EVENTS: tuple[WebhookEvent, ...] = ("start", "output", "logs", "completed")
_DIALECT = "replicate"
_STATUSES: Mapping[JobState, str] = {
    JobState.QUEUED: "starting",
    JobState.RUNNING: "processing",
    JobState.DONE: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "canceled",
}
# Characters of an image in base64 that are kept of it, and from how many on a text without a data URL may be one.
_HEAD, _LONG = 40, 1000
_BAR = 20
_MICROSECONDS = "microseconds"


class PredictionUrlsBody(TypedDict):
    """Addresses of a prediction."""

    get: str
    cancel: str
    stream: str


class PredictionMetricsBody(TypedDict):
    """Seconds that the image took, and seconds since the prediction was made."""

    predict_time: float
    total_time: float


class PredictionBody(TypedDict):
    """A prediction. `output` is a list with the URL of the image; `logs` have progress, the seed and warnings."""

    id: str
    model: str
    version: str
    input: dict[str, Any]
    output: list[str] | None
    logs: str
    error: str | None
    status: Literal["starting", "processing", "succeeded", "failed", "canceled"]
    source: Literal["api"]
    data_removed: bool
    created_at: str
    started_at: str | None
    completed_at: str | None
    metrics: PredictionMetricsBody | dict[str, float]
    urls: PredictionUrlsBody
    webhook: NotRequired[str]
    webhook_events_filter: NotRequired[list[str]]


class PredictionListBody(TypedDict):
    """The latest predictions, newest first, on one page."""

    previous: None
    next: None
    results: list[PredictionBody]


@dataclass(frozen=True, slots=True)
class PredictionForm:
    """What is stored of a prediction with its job: its model and input as they were sent, and its webhook.

    `input` is without images in base64. `events` are the wanted webhook events, `ignored` the parameters without
    effect.
    """

    model: str
    version: str
    input: Mapping[str, Any]
    webhook: str | None = None
    events: Sequence[str] = EVENTS
    ignored: Sequence[str] = ()

    @classmethod
    def of(cls, form: str) -> PredictionForm | None:
        """Read what is stored with a job; `None` if it is no prediction."""
        if not form:
            return None
        try:
            values = json.loads(form)
            if values.pop("dialect") != _DIALECT:
                return None
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def text(self) -> str:
        """Return what is stored with the job."""
        values = {"model": self.model, "version": self.version, "input": shown_input(self.input)}
        more = {"webhook": self.webhook, "events": list(self.events), "ignored": list(self.ignored)}
        return dumps({"dialect": _DIALECT, **values, **more})

    def wants(self, state: JobState) -> bool:
        """Return whether there is a webhook message in a state: an accepted job's is its start."""
        if state is JobState.QUEUED:
            return "start" in self.events
        return bool({"completed", "logs", *(["output"] if state is JobState.DONE else [])} & set(self.events))


def shown_input(value: Any) -> Any:
    """Return an input without images in base64, of which the beginning stays."""
    if isinstance(value, str) and (is_data_url(value) or (len(value) > _LONG and _has_one_word(value[:_LONG]))):
        return f"{value[:_HEAD]}…"
    if isinstance(value, Mapping):
        return {name: shown_input(part) for name, part in value.items()}
    return [shown_input(part) for part in value] if isinstance(value, list | tuple) else value


def _has_one_word(text: str) -> bool:
    return text.isascii() and " " not in text


def prediction_body(job: JobStatus, base: str, url: Callable[[str], str]) -> PredictionBody:
    """Return a job as a prediction; `base` is the URL of this server, `url` makes that of an object key.

    Raises `NotFound` for a job that is no prediction.
    """
    form = PredictionForm.of(job.form)
    if form is None:
        raise NotFound("There is no such prediction.")
    result = job.outcome if isinstance(job.outcome, GenerationResult) else None
    problem = job.outcome if isinstance(job.outcome, StoredProblem) else None
    at = f"{base}/v1/predictions/{job.id}"
    seconds = sum(value for name, value in (result.timings if result else {}).items() if name not in ("total", "queue"))
    ended = job.ended_at
    body: PredictionBody = {
        "id": job.id,
        "model": form.model,
        "version": form.version,
        "input": dict(form.input),
        "output": None if result is None else [url(result.key)],
        "logs": _logs(job, form),
        "error": None if problem is None else problem.detail,
        "status": _STATUSES[job.state],  # type: ignore[typeddict-item]  # the values of the table
        "source": "api",
        "data_removed": False,
        "created_at": _moment(job.accepted_at),
        "started_at": None if ended is None or result is None else _moment(max(job.accepted_at, ended - seconds)),
        "completed_at": None if ended is None else _moment(ended),
        "metrics": {}
        if ended is None
        else {"predict_time": round(seconds, 4), "total_time": round(ended - job.accepted_at, 4)},
        "urls": {"get": at, "cancel": f"{at}/cancel", "stream": f"{at}/stream"},
    }
    if form.webhook is not None:
        body |= {"webhook": form.webhook, "webhook_events_filter": list(form.events)}
    return body


def webhook_message(record: JobRecord, url: Callable[[str], str]) -> str | None:
    """Return the webhook message about the start or end of a prediction, `None` if its filter leaves it out."""
    form = PredictionForm.of(record.form)
    if form is None or not form.wants(record.state):
        return None
    return dumps(prediction_body(JobStatus.from_record(record), record.base_url, url))


def progress_line(job: JobStatus) -> str:
    """Return the progress of a job as tqdm writes it, which Replicate's clients parse; empty before the first step."""
    if isinstance(job.outcome, GenerationResult):
        step = steps = job.outcome.num_inference_steps or 1
    else:
        step, steps = job.step, job.steps
    if not steps:
        return ""
    return f"{100 * step // steps}%|{('█' * (_BAR * step // steps)).ljust(_BAR)}| {step}/{steps}"


def _logs(job: JobStatus, form: PredictionForm) -> str:
    lines = [f"{name} has no effect here." for name in form.ignored]
    if isinstance(job.outcome, GenerationResult):
        lines += [f"Using seed: {job.outcome.seed}", *(warning.message for warning in job.outcome.warnings)]
    return "\n".join([*lines, *filter(None, [progress_line(job)])])


def _moment(seconds: float) -> str:
    """Return a time in seconds since the epoch as Replicate writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=_MICROSECONDS).replace("+00:00", "Z")
