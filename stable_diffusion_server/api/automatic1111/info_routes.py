"""Routes of AUTOMATIC1111's API that do not generate images: progress, interrupt, options, models, PNG info."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachetools import LRUCache
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.automatic1111 import responses
from stable_diffusion_server.api.automatic1111.name_mapping import model_named
from stable_diffusion_server.api.automatic1111.progress import LEAST_NAME, TaskTracker, TrackedTask
from stable_diffusion_server.api.automatic1111.responses import (
    Automatic1111LoraBody,
    Automatic1111ModelBody,
    Automatic1111OptionsBody,
    Automatic1111PngInfoBody,
    Automatic1111ProgressBody,
    Automatic1111SamplerBody,
    Automatic1111TaskProgressBody,
)
from stable_diffusion_server.api.base64_images import EncodedPreviews, bytes_of
from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import json_body, query_parameter
from stable_diffusion_server.api.request_parsing import read_json, read_parameters
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.types import Caller, Format

# Maximum concurrent list requests, each on a thread; maximum running and waiting list requests per caller.
LIST_CONCURRENCY, MAX_LISTS_PER_CALLER = 4, 64
_CHOICES_MAX = 1000
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_TASK_ID = query_parameter("id_task", {"type": "string"})
_SKIP_IMAGE = query_parameter("skip_current_image", {"type": "boolean"})
_OPTIONAL_TEXT = {"type": ["string", "null"]}


class ModelChoices:
    """The model that each caller chose with the options. LRU caches bound the number of choices.

    API keys and anonymous callers have a cache each, because anonymous callers can come from any number of addresses.
    """

    def __init__(self) -> None:
        self._of_keys: LRUCache[str, str] = LRUCache(_CHOICES_MAX)
        self._of_anonymous: LRUCache[str, str] = LRUCache(_CHOICES_MAX)

    def get(self, caller: Caller) -> str | None:
        """Return the model that a caller chose, `None` without a choice."""
        return self._cache_of(caller).get(caller.owner)

    def set(self, caller: Caller, model: str) -> None:
        """Store the choice of a caller."""
        self._cache_of(caller)[caller.owner] = model

    def _cache_of(self, caller: Caller) -> LRUCache[str, str]:
        return self._of_anonymous if " " in caller.owner else self._of_keys  # names of API keys contain no spaces


def add_progress_routes(routes: APIRouter, tasks: TaskTracker, previews: EncodedPreviews) -> None:
    """Add the routes that report and interrupt the caller's own tasks."""

    async def preview_of(own: Sequence[TrackedTask]) -> str | None:
        """Return the latest preview of the oldest task, as a PNG in base64."""
        pixels = own[0].preview if own else None
        return None if pixels is None else await previews.text(pixels, Format.PNG)

    @routes.get(
        "/sdapi/v1/progress",
        summary="AUTOMATIC1111: progress of your task",
        operation_id="sdapi_progress",
        openapi_extra={"parameters": [_TASK_ID, _SKIP_IMAGE]},
        response_model=None,
        responses={200: {"model": Automatic1111ProgressBody}},
    )
    async def progress(request: Request) -> Response:
        """Return the progress of the caller's oldest task, or of the one with `id_task`."""
        query = await read_parameters(request)
        own = tasks.of(caller_of(request), str(query.get("id_task", "")))
        skip = str(query.get("skip_current_image", "false")).lower()
        if skip not in _BOOLEANS:
            raise InvalidInput("skip_current_image must be true or false.", field="skip_current_image")
        return JSONResponse(responses.progress_body(own, None if _BOOLEANS[skip] else await preview_of(own)))

    @routes.post(
        "/internal/progress",
        summary="AUTOMATIC1111: progress of a task by its id",
        operation_id="sdapi_internal_progress",
        openapi_extra=json_body({"id_task": _OPTIONAL_TEXT}),
        response_model=None,
        responses={200: {"model": Automatic1111TaskProgressBody}},
    )
    async def internal_progress(request: Request) -> Response:
        """Return the progress of the caller's task `id_task`, which is the `force_task_id` of its request."""
        body = await read_json(request)
        own = tasks.of(caller_of(request), _text(body, "id_task"))
        preview = None if body.get("live_preview") is False else await preview_of(own)
        return JSONResponse(responses.task_progress_body(own[0] if own else None, preview))

    @routes.post(
        "/sdapi/v1/interrupt",
        summary="AUTOMATIC1111: interrupt your tasks",
        operation_id="sdapi_interrupt",
        openapi_extra={"parameters": [_TASK_ID]},
        response_model=None,
    )
    async def interrupt(request: Request) -> Response:
        """Interrupt the caller's own tasks, or the one with `id_task`. They return the images that are complete."""
        caller, name = caller_of(request), request.query_params.get("id_task", "")
        if caller.anonymous and len(name) < LEAST_NAME:
            raise Forbidden(f"Without a key a task is stopped by its id_task, of {LEAST_NAME} characters or more.")
        for task in tasks.of(caller, name):
            task.interrupt()
        return JSONResponse({})


def add_option_routes(routes: APIRouter, context: DialectContext, choices: ModelChoices) -> None:
    """Add the routes that read and set the options. Clients can set the model only."""

    @routes.get(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: the options",
        operation_id="sdapi_options",
        response_model=None,
        responses={200: {"model": Automatic1111OptionsBody}},
    )
    async def options(request: Request) -> Response:
        """Return the options that this server supports."""
        return JSONResponse(responses.options_body(context, choices.get(caller_of(request))))

    @routes.post(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: choose a model",
        operation_id="sdapi_set_options",
        openapi_extra=json_body({"sd_model_checkpoint": _OPTIONAL_TEXT}),
        response_model=None,
    )
    async def set_options(request: Request) -> Response:
        """Choose the model of this caller by `sd_model_checkpoint`; other options are ignored."""
        if name := _text(await read_json(request), "sd_model_checkpoint"):
            choices.set(caller_of(request), model_named(name, context))
        return JSONResponse(None)


def add_list_routes(routes: APIRouter, context: DialectContext) -> None:
    """Add the routes that list models, samplers and LoRAs, and the route that reads an image's metadata."""
    queue = FairRequestQueue(
        LIST_CONCURRENCY, MAX_LISTS_PER_CALLER, f"{MAX_LISTS_PER_CALLER} lists are being made for you."
    )
    for name, body_of, item in (
        ("sd-models", responses.models_body, Automatic1111ModelBody),
        ("samplers", responses.samplers_body, Automatic1111SamplerBody),
        ("loras", responses.loras_body, Automatic1111LoraBody),
    ):
        _add_list_route(routes, name, body_of, list[item], context, queue)  # type: ignore[valid-type]  # a schema

    @routes.post(
        "/sdapi/v1/png-info",
        summary="AUTOMATIC1111: how an image was made",
        operation_id="sdapi_png_info",
        openapi_extra=json_body({"image": {"type": "string", "minLength": 1}}, "image"),
        response_model=None,
        responses={200: {"model": Automatic1111PngInfoBody}},
    )
    async def png_info(request: Request) -> Response:
        """Return how an image, in base64, says it was made."""
        image = _text(await read_json(request, frozenset({"image"})), "image")
        return JSONResponse(await run_if_large(len(image), lambda: responses.png_info_body(bytes_of(image, "image"))))


def _add_list_route(
    routes: APIRouter,
    name: str,
    body_of: Callable[[DialectContext], Any],
    body: Any,
    context: DialectContext,
    queue: FairRequestQueue,
) -> None:
    async def listed(request: Request) -> Response:
        async with queue.hold(caller_of(request).share):
            return JSONResponse(await run_in_threadpool(body_of, context))  # scans the LoRA folder

    routes.add_api_route(
        f"/sdapi/v1/{name}",
        listed,
        methods=["GET"],
        summary=f"AUTOMATIC1111: {name}",
        description=body_of.__doc__,
        operation_id=f"sdapi_{name.replace('-', '_')}",
        response_model=None,
        responses={200: {"model": body}},
    )


def _text(body: dict[str, Any], name: str) -> str:
    value = "" if body.get(name) is None else body[name]
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a text.", field=name)
    return value
