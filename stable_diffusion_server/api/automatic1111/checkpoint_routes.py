"""AUTOMATIC1111's orders to read the checkpoints again, and to unload and load the caller's checkpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from fastapi import APIRouter, Request, Response

from stable_diffusion_server.api.automatic1111.options import CallerOptions, model_of
from stable_diffusion_server.api.dependencies import DialectContext, ModelChanges, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.errors import ModelStays
from stable_diffusion_server.types import Caller


def add_checkpoint_routes(
    routes: APIRouter, context: DialectContext, options: CallerOptions, changes: ModelChanges
) -> None:
    """Add the routes. They act for the operator; for others, whose clients send them too, they change nothing."""

    async def refresh(caller: Caller) -> None:
        await changes.refresh()

    async def unload(caller: Caller) -> None:
        await changes.unload(context.model(model_of(options.of(caller))).name)

    async def reload(caller: Caller) -> None:
        await changes.load(context.model(model_of(options.of(caller))).name, caller)

    _add_order(routes, "refresh-checkpoints", "Reads MODELS_DIR again.", refresh, None)
    _add_order(routes, "unload-checkpoint", "Unloads your model.", unload, {})
    _add_order(routes, "reload-checkpoint", "Loads your model.", reload, {})


def _add_order(
    routes: APIRouter, name: str, description: str, act: Callable[[Caller], Awaitable[None]], answer: object
) -> None:
    async def order(request: Request) -> Response:
        await request.body()  # a client that still sends would see a closed connection instead of the answer
        caller = caller_of(request)
        if caller.has_full_access:
            with suppress(ModelStays):  # clients unload checkpoints without being asked to
                await act(caller)
        return JSONResponse(answer)

    routes.add_api_route(
        f"/sdapi/v1/{name}",
        order,
        methods=["POST"],
        summary=f"AUTOMATIC1111: {name}",
        description=f"{description} Without an admin key it is accepted without effect.",
        operation_id=f"sdapi_{name.replace('-', '_')}",
        response_model=None,
    )
