"""Routes for operators: liveness, readiness and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.schemas.responses import HealthBody, ReadinessBody, described
from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.types import Caller

_LIMITED = "A key that is not limited to some models reads what is missing."
_ASK = "Send an API key to read what is missing; without API_KEYS, clients on this machine can read it."


def health_router(
    missing: Callable[[], list[str]],
    exposition: Callable[[], bytes],
    loaded: Callable[[], Sequence[Mapping[str, object]]] = tuple,
    remarks: Callable[[], Sequence[str]] = tuple,
    may_use: Callable[[Caller, str], bool] = lambda caller, model: True,
) -> APIRouter:
    """Return the routes. `missing` returns the reasons why the server is not ready; `loaded` returns its models.

    `may_use` says whether a caller may use the model of a name; others are not listed.
    `remarks` returns limitations as sentences, `exposition` the text of the Prometheus metrics.
    """
    routes = APIRouter(tags=["operate"])

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/docs")

    # Names that other servers give it.
    @routes.get("/health", include_in_schema=False)
    @routes.get("/ping", include_in_schema=False)
    @routes.get(
        "/healthz",
        operation_id="healthz",
        summary="Is the process alive?",
        response_model=None,
        responses={200: {"model": described(HealthBody)}},
    )
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get(
        "/readyz",
        operation_id="readyz",
        summary="Can the server generate images? 503 lists what is missing.",
        response_model=None,
        responses={200: {"model": described(ReadinessBody)}, 503: {"model": described(ReadinessBody)}},
    )
    async def readyz(request: Request) -> Response:
        reasons = await run_in_threadpool(missing)
        models = await run_in_threadpool(loaded)  # scans the LoRA folder
        own = [model for model in models if may_use(caller_of(request), str(model["name"]))]
        body = _readiness(request, reasons, own, remarks())
        return JSONResponse(body, 503 if reasons else 200, {"Retry-After": "2"} if reasons else None)

    @routes.get(
        "/metrics",
        operation_id="metrics",
        summary="Metrics in Prometheus's text format",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics(request: Request) -> Response:
        if caller_of(request).anonymous:
            raise Forbidden("Metrics need a key.")
        return Response(await run_in_threadpool(exposition), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _readiness(
    request: Request, reasons: list[str], models: Sequence[Mapping[str, object]], remarks: Sequence[str]
) -> dict[str, object]:
    """Return what the caller may read; remarks and reasons name models that some keys may not use."""
    status = "not ready" if reasons else "ready"
    if not _may_read_details(request):
        return {"status": status, "missing": [_ASK] if reasons else [], "models": [], "remarks": []}
    shown = list(remarks) if caller_of(request).uses_all_models else []
    lacking = reasons if caller_of(request).uses_all_models or not reasons else [_LIMITED]
    return {"status": status, "missing": lacking, "models": list(models), "remarks": shown}


def _may_read_details(request: Request) -> bool:
    """Return whether the caller may read details: callers with API keys, the operator, and this server's UI."""
    return not caller_of(request).anonymous or "inside" in request.scope.get("state", {})
