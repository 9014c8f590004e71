"""Routes of AUTOMATIC1111's API about tasks and images: progress, interrupt, skip, and PNG info."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from stable_diffusion_server.api.automatic1111 import responses
from stable_diffusion_server.api.automatic1111.progress import LEAST_NAME, TaskTracker, TrackedTask
from stable_diffusion_server.api.automatic1111.responses import (
    Automatic1111PngInfoBody,
    Automatic1111ProgressBody,
    Automatic1111TaskProgressBody,
)
from stable_diffusion_server.api.base64_images import EncodedPreviews, bytes_of
from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import json_body, query_parameter
from stable_diffusion_server.api.request_parsing import read_json, read_parameters
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.types import Format

# The texts that AUTOMATIC1111 reads as booleans in a query.
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on", "t", "y"), True),
    **dict.fromkeys(("false", "0", "no", "off", "f", "n"), False),
}
_TASK_ID = query_parameter("id_task", {"type": "string"})
_SKIP_IMAGE = query_parameter("skip_current_image", {"type": "boolean"})
_OPTIONAL_TEXT = {"type": ["string", "null"]}


def add_progress_routes(routes: APIRouter, tasks: TaskTracker, previews: EncodedPreviews) -> None:
    """Add the routes that report the caller's own tasks."""

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
        responses={200: {"model": described(Automatic1111ProgressBody)}},
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
        responses={200: {"model": described(Automatic1111TaskProgressBody)}},
    )
    async def internal_progress(request: Request) -> Response:
        """Return the progress of the caller's task `id_task`, which is the `force_task_id` of its request."""
        body = await read_json(request)
        own = tasks.of(caller_of(request), _text(body, "id_task"))
        preview = None if body.get("live_preview") is False else await preview_of(own)
        return JSONResponse(responses.task_progress_body(own[0] if own else None, preview))


def add_stop_routes(routes: APIRouter, tasks: TaskTracker) -> None:
    """Add the routes that stop the caller's own tasks."""

    def stoppable(request: Request) -> list[TrackedTask]:
        """Return the tasks that a request may stop. Raises `Forbidden`."""
        caller, name = caller_of(request), request.query_params.get("id_task", "")
        if caller.anonymous and len(name) < LEAST_NAME:
            raise Forbidden(f"Without a key a task is stopped by its id_task, of {LEAST_NAME} characters or more.")
        return tasks.of(caller, name)

    @routes.post(
        "/sdapi/v1/interrupt",
        summary="AUTOMATIC1111: interrupt your tasks",
        operation_id="sdapi_interrupt",
        openapi_extra={"parameters": [_TASK_ID]},
        response_model=None,
    )
    async def interrupt(request: Request) -> Response:
        """Interrupt the caller's own tasks, or the one with `id_task`. They return their images as they are now."""
        for task in stoppable(request):
            task.interrupt()
        return JSONResponse({})

    @routes.post(
        "/sdapi/v1/skip",
        summary="AUTOMATIC1111: skip the image that is generated",
        operation_id="sdapi_skip",
        openapi_extra={"parameters": [_TASK_ID]},
        response_model=None,
    )
    async def skip(request: Request) -> Response:
        """Answer the images that are being generated as they are now; those that were not started follow."""
        for task in stoppable(request):
            task.skip()
        return JSONResponse(None)


def add_png_info_route(routes: APIRouter) -> None:
    """Add the route that reads an image's metadata."""

    @routes.post(
        "/sdapi/v1/png-info",
        summary="AUTOMATIC1111: how an image was made",
        operation_id="sdapi_png_info",
        openapi_extra=json_body({"image": {"type": "string", "minLength": 1}}, "image"),
        response_model=None,
        responses={200: {"model": described(Automatic1111PngInfoBody)}},
    )
    async def png_info(request: Request) -> Response:
        """Return how an image, in base64, says it was made."""
        image = _text(await read_json(request, frozenset({"image"})), "image")
        return JSONResponse(await run_if_large(len(image), lambda: responses.png_info_body(bytes_of(image, "image"))))


def _text(body: dict[str, Any], name: str) -> str:
    value = "" if body.get(name) is None else body[name]
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a text.", field=name)
    return value
