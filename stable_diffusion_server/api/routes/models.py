"""Routes that load and unload models and read MODELS_DIR again, for the operator. The lists are OpenAI's routes."""

from __future__ import annotations

from collections.abc import Awaitable

from fastapi import APIRouter, Request, Response

from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import DialectContext, ModelChanges, caller_of, check_operator
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.openai.responses import OpenAIModelBody, OpenAIModelListBody, model_body, models_body
from stable_diffusion_server.errors import ModelNotFound
from stable_diffusion_server.types import Caller


def models_router(context: DialectContext, changes: ModelChanges) -> APIRouter:
    """Return the routes. They need an admin key, or a server without keys; strangers are refused."""
    routes = APIRouter(tags=["models"], prefix="/v1/models")

    @routes.post(
        "/refresh",
        summary="Read MODELS_DIR again",
        operation_id="refresh_models",
        response_model=None,
        responses={200: {"model": OpenAIModelListBody}},
    )
    async def refresh(request: Request) -> Response:
        """List the models after new files were found, and removed or replaced ones unloaded."""
        check_operator(caller_of(request))
        await request.body()
        await changes.refresh()
        return JSONResponse(models_body(context))

    @routes.post(
        "/{model:path}/load",
        summary="Load a model",
        operation_id="load_model",
        response_model=None,
        responses={200: {"model": OpenAIModelBody}},
    )
    async def load(request: Request, model: str) -> Response:
        """Load a model into memory, and answer when it is there; others may be unloaded for it."""
        caller = caller_of(request)
        name = _checked(caller, context, model)
        if await cancel_on_disconnect(request, _done(changes.load(name, caller))) is None:
            return client_closed_request()
        return JSONResponse(model_body(name, context))

    @routes.post(
        "/{model:path}/unload",
        summary="Unload a model",
        operation_id="unload_model",
        response_model=None,
        responses={200: {"model": OpenAIModelBody}},
    )
    async def unload(request: Request, model: str) -> Response:
        """Unload a model from memory as soon as no request uses it; the next request loads it again."""
        name = _checked(caller_of(request), context, model)
        if await cancel_on_disconnect(request, _done(changes.unload(name))) is None:
            return client_closed_request()
        return JSONResponse(model_body(name, context))

    return routes


def _checked(caller: Caller, context: DialectContext, model: str) -> str:
    """Return the name of the model that an operator means. Raises `Forbidden` and `ModelNotFound`."""
    check_operator(caller)
    spec = context.find_model(model)
    if spec is None:
        raise context.refusal(model, ModelNotFound)
    return spec.name


async def _done(work: Awaitable[None]) -> bool:
    """Wait for work that returns nothing; `cancel_on_disconnect` returns `None` for a client that left."""
    await work
    return True
