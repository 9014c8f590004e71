"""Routes of the original server: a prompt, an image and a mask in, the URL of a stored image out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from stable_diffusion_server.api.dependencies import UrlOf
from stable_diffusion_server.api.dispatch import RequestDispatcher
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.api.openapi.document import IMAGE_FILE, parameters_openapi
from stable_diffusion_server.api.schemas.inpaint_params import InpaintParams
from stable_diffusion_server.api.schemas.params import (
    EditParams,
    ImageToImageParams,
    ImageToImageUploadParams,
    TextToImageParams,
    generation_from_request,
)
from stable_diffusion_server.api.schemas.responses import GenerationResultBody, JobStatusBody, described, result_body
from stable_diffusion_server.api.schemas.upscale_params import UpscaleParams
from stable_diffusion_server.api.schemas.validation import RequestedGeneration
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.imaging import media_type_of
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.types import GenerationRequest, GenerationResult

_EXAMPLE: Mapping[str, object] = {
    "path": "http://127.0.0.1:8000/files/static/uploads/demo/first.webp",
    "key": "static/uploads/demo/first.webp",
    "stored": True,
    "cached": False,
    "coalesced": False,
    "task": "text_to_image",
    "model": next(iter(MODELS)),
    "seed": 1234567,
    "width": 1024,
    "height": 1024,
    "num_inference_steps": 4,
    "guidance_scale": 2.0,
    "scheduler": "euler",
    "batched": False,
    "warnings": [],
    "timings": {"total": 0.81},
}
_ACCEPTED = {"model": described(JobStatusBody), "description": "A job, for `Prefer: respond-async`"}
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {"model": described(GenerationResultBody), "content": {"application/json": {"example": _EXAMPLE}}},
    202: _ACCEPTED,
}
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": IMAGE_FILE}, 202: _ACCEPTED}


@dataclass(frozen=True, slots=True)
class _Route:
    """A path, its parameters, its texts in OpenAPI, and whether it answers with the image file."""

    path: str
    params: type[RequestedGeneration]
    summary: str
    description: str
    answers_file: bool = False
    upscales: bool = False


_ROUTES = (
    _Route(
        "/create_and_upload_image",
        TextToImageParams,
        "Text to image, stored",
        "Generate an image from a prompt, store it, and return its URL and how it was made.",
    ),
    _Route(
        "/make_image",
        TextToImageParams,
        "Text to image, as a file",
        "The same, but return the image itself; `Content-Location` is its URL.",
        answers_file=True,
    ),
    _Route(
        "/inpaint_and_upload_image",
        InpaintParams,
        "Inpainting, stored",
        "Repaint an image where a mask is white, or extend it by new sides, and keep every other pixel.",
    ),
    _Route(
        "/edit_and_upload_image",
        EditParams,
        "Edit by instruction, stored",
        "Draw what the prompt says of one or more images, with a model that looks at reference images.",
    ),
    _Route(
        "/style_transfer_and_upload_image",
        ImageToImageParams,
        "Image to image, stored",
        "Change an image according to a prompt, as much as `strength` says; `canny` keeps its edges.",
    ),
    _Route(
        "/upscale_and_upload_image",
        UpscaleParams,
        "Enlarge an image, stored",
        "Enlarge an image with an upscaler, in tiles, store it, and return its URL.",
        upscales=True,
    ),
    _Route(
        "/style_transfer_bytes_and_upload_image",
        ImageToImageUploadParams,
        "Image to image for an uploaded file, stored",
        "The same for a file; its object key starts with eight digits of a digest of its content.",
    ),
)


def generate_router(
    dispatcher: RequestDispatcher, limits: RequestLimits, url_of: UrlOf, *, get_generates: bool = True
) -> APIRouter:
    """Return the routes; `url_of` makes the URL of an object key.

    GET also generates, as in the original server; with `get_generates` false, only POST does.
    """
    routes = APIRouter(tags=["draw"])

    def render_json(request: Request, result: GenerationResult, _: bytes) -> Response:
        return JSONResponse(result_body(result, url_of(request, result.key)))

    def render_file(request: Request, result: GenerationResult, file: bytes) -> Response:
        headers = {"Content-Location": url_of(request, result.key)}
        if result.warnings:
            headers["X-Warnings"] = ", ".join(dict.fromkeys(warning.code for warning in result.warnings))
        return Response(file, media_type=media_type_of(file), headers=headers)

    def add(route: _Route) -> None:
        render = render_file if route.answers_file else render_json
        bounds = limits.for_upscaling() if route.upscales else limits
        generation_of = generation_from_request(route.params, bounds)

        async def handler(request: Request, generation: GenerationRequest = Depends(generation_of)) -> Response:
            return await dispatcher.dispatch(request, generation, render, with_file=route.answers_file)

        for method in ("GET", "POST") if get_generates else ("POST",):
            routes.add_api_route(
                route.path,
                handler,
                methods=[method],
                summary=route.summary,
                description=route.description,
                operation_id=f"{route.path.strip('/')}_{method.lower()}",
                openapi_extra=parameters_openapi(route.params, bounds, method),
                response_model=None,
                response_class=Response if route.answers_file else JSONResponse,
                responses=_FILE if route.answers_file else _RESULT,
            )

    for route in _ROUTES:
        add(route)
    return routes
