"""Routes of AUTOMATIC1111's API that list what is installed, and its orders that need no work on this server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.automatic1111 import list_bodies, responses
from stable_diffusion_server.api.automatic1111.list_bodies import (
    Automatic1111EmbeddingsBody,
    Automatic1111FlagsBody,
    Automatic1111LatentModeBody,
    Automatic1111MemoryBody,
    Automatic1111SchedulerBody,
    Automatic1111ScriptInfoBody,
    Automatic1111ScriptsBody,
    Automatic1111StyleBody,
    Automatic1111UpscalerBody,
)
from stable_diffusion_server.api.automatic1111.options import CallerOptions, model_of
from stable_diffusion_server.api.automatic1111.responses import (
    Automatic1111LoraBody,
    Automatic1111ModelBody,
    Automatic1111SamplerBody,
)
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.errors import Forbidden, InvalidInput, ServerError
from stable_diffusion_server.types import Caller

# Maximum concurrent list requests, each on a thread; maximum running and waiting list requests per caller.
LIST_CONCURRENCY, MAX_LISTS_PER_CALLER = 4, 64

# Lists that are empty here: `sd-modules` is Forge's, `lycos` an extension's, the artists those of versions before 2023.
_EMPTY = (
    *("sd-vae", "sd-modules", "hypernetworks", "face-restorers", "realesrgan-models"),
    *("extensions", "lycos", "artists", "artist-categories"),
)
# Orders that change nothing here, with AUTOMATIC1111's answer: each request reads these lists.
_DONE: dict[str, Any] = dict.fromkeys(("refresh-vae", "refresh-loras", "refresh-embeddings"))
_STOP = Forbidden("The operator stops and restarts this server, not a client.")
_TRAIN = Forbidden("This server does not train.")
_REFUSED: dict[str, ServerError] = {
    "server-kill": _STOP,
    "server-restart": _STOP,
    "server-stop": _STOP,
    "interrogate": InvalidInput("This server has no model that describes images.", field="model"),
    "create/embedding": _TRAIN,
    "create/hypernetwork": _TRAIN,
    "train/embedding": _TRAIN,
    "train/hypernetwork": _TRAIN,
}


def add_list_routes(routes: APIRouter, context: DialectContext, options: CallerOptions) -> None:
    """Add the routes that list what is installed; `options` know the model that a caller selected."""
    queue = FairRequestQueue(
        LIST_CONCURRENCY, MAX_LISTS_PER_CALLER, f"{MAX_LISTS_PER_CALLER} lists are being made for you."
    )

    def own_context(caller: Caller) -> DialectContext:
        own, selected = context.for_caller(caller), model_of(options.of(caller))
        return replace(own, default_model=selected) if selected and selected in own.models else own

    for name, body_of, body in (
        ("sd-models", responses.models_body, list[Automatic1111ModelBody]),
        ("samplers", responses.samplers_body, list[Automatic1111SamplerBody]),
        ("loras", responses.loras_body, list[Automatic1111LoraBody]),
        ("upscalers", list_bodies.upscalers_body, list[Automatic1111UpscalerBody]),
        ("latent-upscale-modes", list_bodies.latent_modes_body, list[Automatic1111LatentModeBody]),
        ("schedulers", list_bodies.schedulers_body, list[Automatic1111SchedulerBody]),
        ("prompt-styles", list_bodies.styles_body, list[Automatic1111StyleBody]),
        ("embeddings", list_bodies.embeddings_body, Automatic1111EmbeddingsBody),
        ("scripts", list_bodies.scripts_body, Automatic1111ScriptsBody),
        ("script-info", list_bodies.script_info_body, list[Automatic1111ScriptInfoBody]),
        ("cmd-flags", list_bodies.flags_body, Automatic1111FlagsBody),
    ):
        _add_list_route(routes, name, body_of, body, own_context, queue)
    for name in _EMPTY:
        _add_list_route(routes, name, list_bodies.empty_list, list[dict[str, Any]], own_context, queue)

    @routes.get(
        "/sdapi/v1/memory",
        summary="AUTOMATIC1111: memory",
        operation_id="sdapi_memory",
        response_model=None,
        responses={200: {"model": described(Automatic1111MemoryBody)}},
    )
    async def memory(request: Request) -> Response:
        """Return the memory of the process and of the accelerator, in bytes."""
        caller = caller_of(request)
        async with queue.hold(caller.share):
            anonymous = caller.anonymous
            return JSONResponse(await run_in_threadpool(list_bodies.memory_body, context, anonymous=anonymous))


def add_order_routes(routes: APIRouter) -> None:
    """Add the orders that change nothing here, and those that are refused with a reason."""
    for name, answer in _DONE.items():
        _add_order_route(routes, name, "Accepted without effect.", answer)
    for name, error in _REFUSED.items():
        _add_order_route(routes, name, f"Refused: {error.detail}", error)

    @routes.get("/internal/ping", summary="AUTOMATIC1111: ping", operation_id="sdapi_ping", response_model=None)
    async def ping(request: Request) -> Response:
        """Return an empty object."""
        return JSONResponse({})


def _add_list_route(
    routes: APIRouter,
    name: str,
    body_of: Callable[[DialectContext], Any],
    body: Any,
    own_context: Callable[[Caller], DialectContext],
    queue: FairRequestQueue,
) -> None:
    async def listed(request: Request) -> Response:
        caller = caller_of(request)
        async with queue.hold(caller.share):
            return JSONResponse(await run_in_threadpool(body_of, own_context(caller)))  # scans folders

    routes.add_api_route(
        f"/sdapi/v1/{name}",
        listed,
        methods=["GET"],
        summary=f"AUTOMATIC1111: {name}",
        description=body_of.__doc__,
        operation_id=f"sdapi_{name.replace('-', '_')}",
        response_model=None,
        responses={200: {"model": described(body)}},
    )


def _add_order_route(routes: APIRouter, name: str, description: str, answer: Any) -> None:
    """Add a route that answers a constant, or raises it."""

    async def order(request: Request) -> Response:
        await request.body()  # a client that still sends would see a closed connection instead of the answer
        if isinstance(answer, ServerError):
            raise type(answer)(answer.detail, field=answer.field)
        return JSONResponse(answer)

    routes.add_api_route(
        f"/sdapi/v1/{name}",
        order,
        methods=["POST"],
        summary=f"AUTOMATIC1111: {name}",
        description=description,
        operation_id=f"sdapi_{name.replace('-', '_').replace('/', '_')}",
        response_model=None,
    )
