"""The lists of AUTOMATIC1111's ADetailer extension: its version, and the detectors that its units may name."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from typing_extensions import TypedDict

from stable_diffusion_server.api.automatic1111.adetailer import detector_names
from stable_diffusion_server.api.dependencies import DialectContext, caller_of
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.concurrency import FairRequestQueue

# The version of the extension whose arguments are read.
_VERSION = "25.3.0"
_CONCURRENCY, _MAX_PER_CALLER = 2, 16


class AdetailerVersionBody(TypedDict):
    """The version of the extension whose arguments are understood."""

    version: str


class AdetailerModelsBody(TypedDict):
    """Names of the detectors."""

    ad_model: list[str]


def add_adetailer_routes(routes: APIRouter, context: DialectContext) -> None:
    """Add the lists of the extension."""
    queue = FairRequestQueue(_CONCURRENCY, _MAX_PER_CALLER, f"{_MAX_PER_CALLER} lists are being made for you.")

    @routes.get(
        "/adetailer/v1/version",
        summary="ADetailer: version",
        operation_id="adetailer_version",
        response_model=None,
        responses={200: {"model": described(AdetailerVersionBody)}},
    )
    async def version(request: Request) -> Response:
        """Return the version of the extension whose arguments are read."""
        return JSONResponse({"version": _VERSION})

    @routes.get(
        "/adetailer/v1/ad_model",
        summary="ADetailer: detectors",
        operation_id="adetailer_models",
        response_model=None,
        responses={200: {"model": described(AdetailerModelsBody)}},
    )
    async def models(request: Request) -> Response:
        """Return the names of the detectors."""
        async with queue.hold(caller_of(request).share):
            return JSONResponse({"ad_model": await run_in_threadpool(detector_names, context)})
