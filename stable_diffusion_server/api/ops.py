"""The operator's doors: alive, able to draw, figures. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.json_responses import JSONResponse


def router(
    missing: Callable[[], list[str]],
    exposition: Callable[[], bytes],
    loaded: Callable[[], Sequence[Mapping[str, object]]] = tuple,
) -> APIRouter:
    """The operator's doors. `missing` lists, in sentences, what keeps the server from drawing; `loaded`, its models."""
    routes = APIRouter(tags=["operate"])

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    @routes.get("/healthz", operation_id="healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", operation_id="readyz", summary="Can it draw? 503 says what is missing.")
    async def readyz() -> Response:
        reasons = await run_in_threadpool(missing)
        models = await run_in_threadpool(loaded)  # it looks through the folder of adapters
        body = {"status": "not ready" if reasons else "ready", "missing": reasons, "models": list(models)}
        return JSONResponse(body, 503 if reasons else 200, {"Retry-After": "2"} if reasons else None)

    @routes.get("/metrics", operation_id="metrics", summary="Figures in Prometheus's text format")
    async def metrics() -> Response:
        return Response(await run_in_threadpool(exposition), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes
