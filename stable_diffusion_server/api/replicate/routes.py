"""Routes of Replicate's API: make, list, read, follow and cancel predictions, and the secret of webhooks.

A path below `/v1/models` that ends in `/predictions` and is posted makes a prediction, and one whose last segment but
one is `versions` reads a version; all others belong to models, whose ids may have slashes too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field

from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import (
    DialectContext,
    UrlOf,
    caller_of,
    scope_to_caller,
)
from stable_diffusion_server.api.http_responses import EventResponse, FollowerLimiter, JSONResponse
from stable_diffusion_server.api.openapi.document import EVENT_STREAM, bounded_properties, json_body
from stable_diffusion_server.api.replicate.account_routes import add_account_routes
from stable_diffusion_server.api.replicate.prediction_input import PredictionInput, read_input
from stable_diffusion_server.api.replicate.predictions import (
    EVENTS,
    PredictionBody,
    PredictionForm,
    PredictionListBody,
    WebhookEvent,
    prediction_body,
    progress_line,
)
from stable_diffusion_server.api.replicate.versions import VersionBody, version_body
from stable_diffusion_server.api.request_parsing import read_json
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.api.schemas.validation import RequestParams, validated
from stable_diffusion_server.errors import InvalidInput, ModelNotFound
from stable_diffusion_server.generation import NAME_MAX, RequestLimits, parse_int
from stable_diffusion_server.jobs import JobEvent, JobManager, JobStatus
from stable_diffusion_server.pipelines import ModelSpec

_WAIT_MAX, _URL_MAX = 60, 2000
_NO_STORE = {"Cache-Control": "no-store"}
_MADE: dict[int | str, dict[str, Any]] = {
    201: {"model": described(PredictionBody), "description": "A prediction that has ended"},
    202: {"model": described(PredictionBody), "description": "A prediction that has not ended"},
}
_READ: dict[int | str, dict[str, Any]] = {200: {"model": described(PredictionBody)}}


class PredictionParams(RequestParams):
    """The body of a request that makes a prediction."""

    input: dict[str, Any] = Field(description="Parameters of the model.")
    version: str | None = Field(
        None, max_length=NAME_MAX, description="`owner/name`, `owner/name:version`, or a version: a model's name."
    )
    webhook: str | None = Field(None, max_length=_URL_MAX, description="URL that gets the prediction by POST.")
    webhook_completed: str | None = Field(None, max_length=_URL_MAX, description="The same, of its end only.")
    webhook_events_filter: tuple[WebhookEvent, ...] = Field(
        EVENTS, max_length=8, description="Events that `webhook` gets: `start`, `output`, `logs`, `completed`."
    )
    stream: bool | None = Field(None, description="Accepted: each prediction has `urls.stream`.")


@dataclass(frozen=True, slots=True)
class _Predictions:
    """Makes and reads predictions."""

    jobs: JobManager
    context: DialectContext
    url_of: UrlOf
    base_of: Callable[[Request], str]

    async def make(self, request: Request, named: str | None) -> Response:
        """Accept a prediction of the model that the path names, else of `version`, and wait as `Prefer` says."""
        caller = caller_of(request)
        context = self.context.for_caller(caller)
        sent = await read_json(request, frozenset({"input"}))
        params = validated(PredictionParams, sent)
        if (named is None) == (params.version is None):
            raise InvalidInput("Send version, or name the model in the path.", field="version")
        name = named or str(params.version)
        spec = _model_of(name, context)
        size = len(await request.body())  # base64 is decoded here
        read = await run_if_large(size, read_input, params.input, context.limits, spec, context.models)
        webhook = params.webhook or params.webhook_completed
        form = PredictionForm(
            name.partition(":")[0],
            params.version or spec.name,
            params.input,
            webhook,
            params.webhook_events_filter if params.webhook else ("completed",),
            read.ignored_names,
        )
        generation = scope_to_caller(caller, replace(read.to_request(spec), webhook_url=webhook))
        try:
            accepted = await self.jobs.accept(generation, caller, base_url=self.base_of(request), form=form.text())
        except InvalidInput as error:
            if error.field != "webhook_url":
                raise
            raise InvalidInput(error.detail.replace("webhook_url", "webhook"), field="webhook") from error
        assert isinstance(accepted, JobStatus)  # noqa: S101  # a recorded response needs an idempotency key
        wait = _wait_of(request)
        job = await self.jobs.wait_for(accepted.id, caller, wait) if wait else accepted
        body = self.body(request, job)
        if not job.state.ended:
            # The clients poll a prediction that starts, and take one that is processed for the finished one.
            body["status"] = "starting"
        return JSONResponse(body, 201 if job.state.ended else 202, _NO_STORE)

    def body(self, request: Request, job: JobStatus) -> PredictionBody:
        """Return a job as a prediction. Raises `NotFound` for another job."""
        return prediction_body(job, self.base_of(request), lambda key: self.url_of(request, key))

    async def read(self, request: Request, prediction_id: str) -> PredictionBody:
        """Return a prediction by its id. Raises `NotFound`."""
        return self.body(request, await self.jobs.status(prediction_id, caller_of(request)))


def replicate_router(
    jobs: JobManager,
    context: DialectContext,
    url_of: UrlOf,
    base_of: Callable[[Request], str],
    followers: FollowerLimiter,
    webhook_secret: str,
) -> APIRouter:
    """Return the routes; `webhook_secret` is shown to callers with full access only."""
    routes = APIRouter(tags=["replicate"], prefix="/v1")
    predictions = _Predictions(jobs, context, url_of, base_of)
    _add_making_routes(routes, predictions, context)
    _add_reading_routes(routes, predictions, followers)

    add_account_routes(routes, webhook_secret)
    return routes


def _add_making_routes(routes: APIRouter, predictions: _Predictions, context: DialectContext) -> None:
    body = _body_openapi(context.limits)

    @routes.post(
        "/predictions",
        summary="Replicate: make a prediction of a version",
        operation_id="create_prediction",
        openapi_extra=body,
        response_model=None,
        responses=_MADE,
    )
    async def create_prediction(request: Request) -> Response:
        """Make a prediction; `Prefer: wait` or `wait=30` waits for its end, 60 seconds at most."""
        return await predictions.make(request, None)

    @routes.post(
        "/models/{model:path}/predictions",
        summary="Replicate: make a prediction of a model",
        operation_id="create_model_prediction",
        openapi_extra=body,
        response_model=None,
        responses=_MADE,
    )
    async def create_model_prediction(request: Request, model: str) -> Response:
        """Make a prediction of `owner/name`: the model or alias of that whole name, otherwise that of `name`."""
        return await predictions.make(request, model)

    @routes.get(
        "/models/{model:path}/versions/{version}",
        summary="Replicate: a version of a model",
        operation_id="get_model_version",
        response_model=None,
        responses={200: {"model": described(VersionBody)}},
    )
    async def get_version(request: Request, model: str, version: str) -> Response:
        """Return what clients read before they take the output of `owner/name:version`."""
        own = context.for_caller(caller_of(request))
        return JSONResponse(version_body(version, _model_of(version, own), own.limits))


def _add_reading_routes(routes: APIRouter, predictions: _Predictions, followers: FollowerLimiter) -> None:
    jobs = predictions.jobs

    @routes.get(
        "/predictions",
        summary="Replicate: your latest predictions, newest first",
        operation_id="list_predictions",
        response_model=None,
        responses={200: {"model": described(PredictionListBody)}},
    )
    async def list_predictions(request: Request) -> Response:
        listed = [job for job in await jobs.list_jobs(caller_of(request)) if PredictionForm.of(job.form) is not None]
        results = [predictions.body(request, job) for job in listed]
        return JSONResponse({"previous": None, "next": None, "results": results}, headers=_NO_STORE)

    @routes.get(
        "/predictions/{prediction_id}",
        summary="Replicate: a prediction",
        operation_id="get_prediction",
        response_model=None,
        responses=_READ,
    )
    async def get_prediction(request: Request, prediction_id: str) -> Response:
        return JSONResponse(await predictions.read(request, prediction_id), headers=_NO_STORE)

    @routes.post(
        "/predictions/{prediction_id}/cancel",
        summary="Replicate: cancel a prediction; one that has ended does not change",
        operation_id="cancel_prediction",
        response_model=None,
        responses=_READ,
    )
    async def cancel_prediction(request: Request, prediction_id: str) -> Response:
        await request.body()
        await predictions.read(request, prediction_id)  # another job is not found
        job = await jobs.cancel(prediction_id, caller_of(request))
        return JSONResponse(predictions.body(request, job), headers=_NO_STORE)

    @routes.get(
        "/predictions/{prediction_id}/stream",
        summary="Replicate: events of a prediction, as server-sent events",
        operation_id="stream_prediction",
        description="`logs` with its progress, `output` with the URL of the image, `error`, and finally `done`.",
        response_model=None,
        response_class=Response,
        responses={200: {"content": EVENT_STREAM}},
    )
    async def stream_prediction(request: Request, prediction_id: str) -> Response:
        caller = caller_of(request)
        await predictions.read(request, prediction_id)
        events = await jobs.follow(prediction_id, caller, None)
        assert events is not None  # noqa: S101  # only after the final event; narrows the type
        stream = _stream(events, lambda job: predictions.body(request, job))
        return EventResponse(stream, followers, prediction_id, caller.share)


async def _stream(
    events: AsyncGenerator[JobEvent | None], body_of: Callable[[JobStatus], PredictionBody]
) -> AsyncGenerator[bytes]:
    """Yield events as Replicate's clients read them, and comments that keep an idle connection alive."""
    line = ""
    async with aclosing(events):
        async for event in events:
            if event is None:
                yield format_sse_event(comment="still there")
            elif event.status.state.ended:
                body = body_of(event.status)
                for address in body["output"] or ():
                    yield format_sse_event(data_str=address, event="output", id=f"{event.id}.output")
                if body["error"] is not None:
                    yield format_sse_event(data_str=body["error"], event="error", id=f"{event.id}.error")
                reason = {"canceled": '{"reason":"canceled"}', "failed": '{"reason":"error"}'}.get(body["status"], "{}")
                yield format_sse_event(data_str=reason, event="done", id=event.id)
            elif (now := progress_line(event.status)) and now != line:
                line = now
                yield format_sse_event(data_str=line, event="logs", id=event.id)


def _model_of(name: str, context: DialectContext) -> ModelSpec:
    """Return the model of `owner/name`, `owner/name:version`, a version, or a name of this server.

    The whole name comes first, then what follows the owner. Raises `ModelNotFound`, or `Forbidden` for a caller who may
    use some models only.
    """
    reference, _, version = name.partition(":")
    for one in (version or reference, reference, reference.rpartition("/")[2]):
        spec = context.find_model(one) if one else None
        if spec is not None:
            return spec
    raise context.refusal(reference, ModelNotFound)


def _wait_of(request: Request) -> float:
    """Return the seconds that `Prefer: wait` or `wait=n` asks for, 0 without it."""
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            seconds = parse_int(value.strip().strip('"'))
            return float(_WAIT_MAX if seconds is None else min(seconds, _WAIT_MAX))
    return 0.0


def _body_openapi(limits: RequestLimits) -> dict[str, Any]:
    """Return the `requestBody` with the parameters of `input`."""
    properties = bounded_properties(PredictionParams, limits)
    properties["input"] = {
        "type": "object",
        "properties": bounded_properties(PredictionInput, limits),
        "required": ["prompt"],
    }
    return json_body(properties, "input")
