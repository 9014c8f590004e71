"""The doors `/sdapi/v1/…`, for AUTOMATIC1111's clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.aside import run_if_large
from stable_diffusion_server.api.automatic1111 import responses
from stable_diffusion_server.api.automatic1111.name_mapping import BOUNDED, model_named, renamed
from stable_diffusion_server.api.automatic1111.progress import LEAST_NAME, TaskTracker, TrackedTask
from stable_diffusion_server.api.automatic1111.protocol import Img2Img, ParsedTask, Txt2Img, parse_task
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import caller_of, scope_to_caller
from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.previews import EncodedPreviews
from stable_diffusion_server.api.problems import client_gone
from stable_diffusion_server.api.request_parsing import read_json, read_parameters
from stable_diffusion_server.api.schemas.params import raise_invalid
from stable_diffusion_server.api.schemas.wire import properties_of
from stable_diffusion_server.api.together import gather_or_cancel
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import Forbidden, InvalidInput, ServerError, TooLarge
from stable_diffusion_server.generation import GenerationService, RequestLimits
from stable_diffusion_server.types import Caller, Format, GenerationRequest

UrlOf = Callable[[Request, str], str]
A = TypeVar("A", bound=Txt2Img)

# Model by owner, of those who set one; the oldest is forgotten.
# Lists that are made at a time, each on a thread; those of one caller, under way and waiting.
LISTS_AT_ONCE, MOST_LISTS = 4, 64
_CHOICES_MAX = 1000


_TRUTHS = {"true": True, "1": True, "false": False, "0": False}
_TASK = {"name": "id_task", "in": "query", "required": False, "schema": {"type": "string"}}
_SKIP = {"name": "skip_current_image", "in": "query", "required": False, "schema": {"type": "boolean"}}
_PROGRESS: dict[str, Any] = {"parameters": [_TASK, _SKIP]}
_INTERRUPT: dict[str, Any] = {"parameters": [_TASK]}


def _texts(name: str, *, required: bool = False) -> dict[str, Any]:
    """OpenAPI of a body with one text that matters."""
    text: dict[str, Any] = {"type": "string", "minLength": 1} if required else {"type": ["string", "null"]}
    shape = {"type": "object", "properties": {name: text}, "required": [name] if required else []}
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": shape}}}}


def described(schema: type[Txt2Img], limits: RequestLimits, *required: str) -> dict[str, Any]:
    """OpenAPI of a body in JSON, with the bounds the settings set; what it does not name may be there too."""
    bounds = limits.bounds()
    properties = properties_of(schema, limits)
    properties["seed"] = schema.model_json_schema()["properties"]["seed"]  # -1 is a seed here
    for name, ours in {**BOUNDED, "width": "width", "height": "height"}.items():
        for part in properties.get(name, {}).get("anyOf", ()):
            if part.get("type") in ("integer", "number"):
                part.update(minimum=bounds[ours][0], maximum=bounds[ours][1])
    shape = {"type": "object", "properties": properties, "required": ["prompt", *required]}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shape}}}}


def automatic1111_router(
    service: GenerationService, house: DialectContext, url_of: UrlOf, previews: EncodedPreviews
) -> APIRouter:
    """The doors over a service; `url_of` makes the URL of a key for the client at hand."""
    routes = APIRouter(tags=["automatic1111"])
    tasks = TaskTracker()
    chosen: dict[str, str] = {}

    async def pictures(request: Request, schema: type[Txt2Img]) -> Response:
        asked = await _read(schema, request)
        try:
            return await _pictures(request, asked, service, house, url_of, tasks, chosen)
        except ServerError as error:
            raise renamed(error) from error

    @routes.post(
        "/sdapi/v1/txt2img",
        summary="AUTOMATIC1111: draw pictures",
        operation_id="sdapi_txt2img",
        openapi_extra=described(Txt2Img, house.limits),
        response_model=None,
    )
    async def txt2img(request: Request) -> Response:
        """Draw pictures from a prompt."""
        return await pictures(request, Txt2Img)

    @routes.post(
        "/sdapi/v1/img2img",
        summary="AUTOMATIC1111: draw a picture anew, or a part of it",
        operation_id="sdapi_img2img",
        openapi_extra=described(Img2Img, house.limits, "init_images"),
        response_model=None,
    )
    async def img2img(request: Request) -> Response:
        """Draw a picture anew, or what a mask covers."""
        return await pictures(request, Img2Img)

    @routes.post(
        "/sdapi/v1/png-info",
        summary="AUTOMATIC1111: how a picture was made",
        operation_id="sdapi_png_info",
        openapi_extra=_texts("image", required=True),
        response_model=None,
    )
    async def png_info(request: Request) -> Response:
        """How a picture, in base64, says it was made."""
        image = _text(await read_json(request, frozenset({"image"})), "image")
        return JSONResponse(await run_if_large(len(image), lambda: responses.png_info_answer(bytes_of(image, "image"))))

    _progress_doors(routes, tasks, previews)
    _option_doors(routes, house, chosen)
    turns = FairRequestQueue(LISTS_AT_ONCE, MOST_LISTS, f"{MOST_LISTS} lists are being made for you.")
    for name, told in (
        ("sd-models", responses.models_answer),
        ("samplers", responses.samplers_answer),
        ("loras", responses.loras_answer),
    ):
        _list_door(routes, name, told, house, turns)
    return routes


async def _preview_of(tasks: Sequence[TrackedTask], previews: EncodedPreviews) -> str | None:
    """The latest preview of the oldest task, as a PNG in base64."""
    pixels = tasks[0].preview if tasks else None
    return None if pixels is None else await previews.text(pixels, Format.PNG)


def _progress_doors(routes: APIRouter, tasks: TaskTracker, previews: EncodedPreviews) -> None:
    @routes.get(
        "/sdapi/v1/progress",
        summary="AUTOMATIC1111: how far your task is",
        operation_id="sdapi_progress",
        openapi_extra=_PROGRESS,
        response_model=None,
    )
    async def progress(request: Request) -> Response:
        """How far the caller's own task is: the oldest, or the one of `id_task`."""
        query = await read_parameters(request)
        own = tasks.of(caller_of(request), str(query.get("id_task", "")))
        skip = str(query.get("skip_current_image", "false")).lower()
        if skip not in _TRUTHS:
            raise InvalidInput("skip_current_image must be true or false.", field="skip_current_image")
        preview = None if _TRUTHS[skip] else await _preview_of(own, previews)
        return JSONResponse(responses.progress_answer(own, preview))

    @routes.post(
        "/internal/progress",
        summary="AUTOMATIC1111: how far the task of an id is",
        operation_id="sdapi_internal_progress",
        openapi_extra=_texts("id_task"),
        response_model=None,
    )
    async def internal_progress(request: Request) -> Response:
        """How far the caller's own task of `id_task` is, the `force_task_id` it was asked for with."""
        asked = await read_json(request)
        own = tasks.of(caller_of(request), _text(asked, "id_task"))
        shown = asked.get("live_preview") is not False
        preview = await _preview_of(own, previews) if shown else None
        return JSONResponse(responses.internal_progress_answer(own[0] if own else None, preview))

    @routes.post(
        "/sdapi/v1/interrupt",
        summary="AUTOMATIC1111: stop your tasks",
        operation_id="sdapi_interrupt",
        openapi_extra=_INTERRUPT,
        response_model=None,
    )
    async def interrupt(request: Request) -> Response:
        """Stop the caller's own tasks, or the one of `id_task`; they answer what is done."""
        caller, name = caller_of(request), request.query_params.get("id_task", "")
        if caller.anonymous and len(name) < LEAST_NAME:
            raise Forbidden(f"Without a key a task is stopped by its id_task, of {LEAST_NAME} characters or more.")
        for task in tasks.of(caller, name):
            task.interrupt()
        return JSONResponse({})


def _option_doors(routes: APIRouter, house: DialectContext, chosen: dict[str, str]) -> None:
    @routes.get(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: the options",
        operation_id="sdapi_options",
        openapi_extra={},
        response_model=None,
    )
    async def options(request: Request) -> Response:
        """The options that mean something here."""
        return JSONResponse(responses.options_answer(house, chosen.get(caller_of(request).owner)))

    @routes.post(
        "/sdapi/v1/options",
        summary="AUTOMATIC1111: choose a model",
        operation_id="sdapi_set_options",
        openapi_extra=_texts("sd_model_checkpoint"),
        response_model=None,
    )
    async def set_options(request: Request) -> Response:
        """Choose a model by `sd_model_checkpoint`, for this caller alone; other options are let be."""
        asked, caller = await read_json(request), caller_of(request)
        if name := _text(asked, "sd_model_checkpoint"):
            model = model_named(name, house)  # an unknown one changes nothing
            chosen.pop(caller.owner, None)
            chosen[caller.owner] = model
            if len(chosen) > _CHOICES_MAX:
                # Strangers are any number of addresses: theirs make room first.
                del chosen[next((owner for owner in chosen if " " in owner), next(iter(chosen)))]
        return JSONResponse(None)


def _list_door(
    routes: APIRouter,
    name: str,
    told: Callable[[DialectContext], list[dict[str, Any]]],
    house: DialectContext,
    turns: FairRequestQueue,
) -> None:
    async def listed(request: Request) -> Response:
        async with turns.hold(caller_of(request).share):
            return JSONResponse(await run_in_threadpool(told, house))  # adapters are looked for in their folder

    routes.add_api_route(
        f"/sdapi/v1/{name}",
        listed,
        methods=["GET"],
        summary=f"AUTOMATIC1111: {name}",
        description=told.__doc__,
        operation_id=f"sdapi_{name.replace('-', '_')}",
        response_model=None,
    )


async def _pictures(
    request: Request,
    asked: Txt2Img,
    service: GenerationService,
    house: DialectContext,
    url_of: UrlOf,
    tasks: TaskTracker,
    chosen: dict[str, str],
) -> Response:
    caller = caller_of(request)
    what = await run_if_large(len(await request.body()), parse_task, asked, house, chosen.get(caller.owner))
    orders = [scope_to_caller(caller, order) for order in what.orders]
    with tasks.begun(caller, asked.force_task_id or f"task({uuid4().hex})", len(orders)) as task:
        work = [_one(number, order, service, caller, task) for number, order in enumerate(orders)]
        drawn = await cancel_on_disconnect(request, gather_or_cancel(work))
    if drawn is None:
        return client_gone()
    made = [(*one, url_of(request, one[1].key)) for one in drawn if one is not None]
    finished = [(order, receipt, url, file) for order, receipt, file, url in made]
    if sum(len(file) for *_, file in finished) * 4 // 3 > house.max_response_bytes:
        raise TooLarge("The pictures are too large for one answer; send_images=false answers their addresses.")
    told = ParsedTask(orders, what.told)

    def answer() -> Response:
        return JSONResponse(responses.pictures_answer(asked, told, finished, interrupted=task.interrupted))

    return await run_if_large(sum(len(file) for *_, file in finished), answer)


async def _one(
    number: int, order: GenerationRequest, service: GenerationService, caller: Caller, task: TrackedTask
) -> Any:
    work = service.generate_with_bytes(
        order, caller=caller, watch=lambda progress: task.watch(number, progress), previews=True
    )
    drawn = await task.drawn(number, work)
    return None if drawn is None else (order, *drawn)


async def _read(schema: type[A], request: Request) -> A:
    """A JSON body as parameters. Raises `MalformedRequest`, `UnsupportedMedia` and `InvalidInput`."""
    try:
        parameters = await read_json(request, schema.pictures)
        return await run_if_large(len(await request.body()), schema.model_validate, parameters)
    except ValidationError as error:
        raise_invalid(error)


def _text(asked: dict[str, Any], name: str) -> str:
    value = "" if asked.get(name) is None else asked[name]
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a text.", field=name)
    return value
