"""The operator's doors: alive, able to draw, figures. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.errors import Forbidden

_ASK = "What is missing is told to those who send a key, and to clients on this machine where there are none."


def health_router(
    missing: Callable[[], list[str]],
    exposition: Callable[[], bytes],
    loaded: Callable[[], Sequence[Mapping[str, object]]] = tuple,
    remarks: Callable[[], Sequence[str]] = tuple,
) -> APIRouter:
    """The operator's doors. `missing` lists, in sentences, what keeps the server from drawing; `loaded`, its models.

    `remarks` are what those do without, in sentences.
    """
    routes = APIRouter(tags=["operate"])

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    @routes.get("/healthz", operation_id="healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", operation_id="readyz", summary="Can it draw? 503 says what is missing.")
    async def readyz(request: Request) -> Response:
        reasons = await run_in_threadpool(missing)
        models = await run_in_threadpool(loaded)  # it looks through the folder of adapters
        status = "not ready" if reasons else "ready"
        body = {"status": status, "missing": reasons, "models": list(models), "remarks": list(remarks())}
        if not _may_know(request):
            body = {**{name: [] for name in body}, "status": body["status"], "missing": [_ASK] if reasons else []}
        return JSONResponse(body, 503 if reasons else 200, {"Retry-After": "2"} if reasons else None)

    @routes.get("/metrics", operation_id="metrics", summary="Figures in Prometheus's text format")
    async def metrics(request: Request) -> Response:
        if caller_of(request).anonymous:
            raise Forbidden("Without a key no figures are told.")
        return Response(await run_in_threadpool(exposition), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _may_know(request: Request) -> bool:
    """Whether how the server stands is told in detail: to keys, to the operator, and to this server's own UI."""
    return not caller_of(request).anonymous or "inside" in request.scope.get("state", {})
