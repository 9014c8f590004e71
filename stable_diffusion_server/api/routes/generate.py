"""The seed's doors: a prompt, image and mask in, the URL of a stored picture out. Knows no models and no devices."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from stable_diffusion_server.api.dispatch import Render, RequestDispatcher, UrlOf
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.schemas.wire import (
    ImageToImageParams,
    ImageToImageUploadParams,
    InpaintParams,
    NativeParams,
    TextToImageParams,
    documented,
    read_generation_request,
    result_body,
)
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.imaging import media_type_of
from stable_diffusion_server.types import GenerationResult

_DOORS: tuple[tuple[str, type[NativeParams], str, str], ...] = (
    (
        "/create_and_upload_image",
        TextToImageParams,
        "Text to image, stored",
        "Draw a picture from a prompt, store it, and answer where it is and how it was made.",
    ),
    (
        "/make_image",
        TextToImageParams,
        "Text to image, answered",
        "The same, answering the picture itself; `Content-Location` tells where it is stored.",
    ),
    (
        "/inpaint_and_upload_image",
        InpaintParams,
        "Inpainting, stored",
        "Repaint a picture where a mask is white, and keep every other pixel as it is.",
    ),
    (
        "/style_transfer_and_upload_image",
        ImageToImageParams,
        "Image to image, stored",
        "Draw a picture anew after a prompt, as much as `strength` says, with its edges kept if `canny` is set.",
    ),
    (
        "/style_transfer_bytes_and_upload_image",
        ImageToImageUploadParams,
        "Image to image for an uploaded file, stored",
        "The same for a file; its name in the bucket begins with eight digits that tell the content.",
    ),
)


def generate_router(
    answering: RequestDispatcher, limits: RequestLimits, url_of: UrlOf, *, get_generates: bool = True
) -> APIRouter:
    """The upload doors; `url_of` makes the URL of a key for the client at hand.

    GET is there because the original had it; without `get_generates` only POST draws.
    """
    routes = APIRouter(tags=["draw"])

    def told(request: Request, receipt: GenerationResult, _: bytes) -> Response:
        return JSONResponse(result_body(receipt, url_of(request, receipt.key)))

    def shown(request: Request, receipt: GenerationResult, picture: bytes) -> Response:
        headers = {"Content-Location": url_of(request, receipt.key)}
        if receipt.warnings:
            headers["X-Warnings"] = ", ".join(warning.code for warning in receipt.warnings)
        return Response(picture, media_type=media_type_of(picture), headers=headers)

    def door(path: str, schema: type[NativeParams], render: Render, summary: str, description: str) -> None:
        """One path for GET and POST, over the parameters of `schema`."""

        async def handler(request: Request) -> Response:
            order = await read_generation_request(request, schema)
            return await answering.dispatch(request, order, render, picture=render is shown)

        for method in ("GET", "POST") if get_generates else ("POST",):
            routes.add_api_route(
                path,
                handler,
                methods=[method],
                summary=summary,
                description=description,
                operation_id=f"{path.strip('/')}_{method.lower()}",
                openapi_extra=documented(schema, limits, method),
                response_model=None,
            )

    for path, schema, summary, description in _DOORS:
        door(path, schema, shown if path == "/make_image" else told, summary, description)
    return routes
