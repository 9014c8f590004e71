"""The seed's doors: a prompt in, the URL of a stored picture out. Knows no models and no devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from stable_diffusion_server.api.handlers import client_gone
from stable_diffusion_server.api.schemas import TextToImage, documented, read_text_to_image, receipt_body
from stable_diffusion_server.errors import NotReady
from stable_diffusion_server.orders import Limits
from stable_diffusion_server.service import Service

T = TypeVar("T")
UrlOf = Callable[[Request, str], str]


def router(service: Service, limits: Limits, url_of: UrlOf) -> APIRouter:
    """The upload doors over a service; `url_of` makes the URL of a key for the client at hand."""
    routes = APIRouter(tags=["draw"])

    def both_methods(path: str, handler: Callable[..., Any], summary: str) -> None:
        for method in ("GET", "POST"):
            routes.add_api_route(
                path,
                handler,
                methods=[method],
                summary=summary,
                operation_id=f"{handler.__name__}_{method.lower()}",
                openapi_extra=documented(TextToImage, limits, method),
                response_model=None,
            )

    async def create_and_upload_image(request: Request) -> Response:
        """Draw a picture from a prompt, store it, and answer where it is and how it was made."""
        order = await read_text_to_image(request)
        receipt = await unless_disconnected(request, service.fulfil(order))
        if receipt is None:
            return client_gone()
        return JSONResponse(receipt_body(receipt, url_of(request, receipt.key)))

    async def make_image(request: Request) -> Response:
        """The same, answering the picture itself; `Content-Location` tells where it is stored."""
        order = await read_text_to_image(request)
        receipt = await unless_disconnected(request, service.fulfil(order))
        if receipt is None:
            return client_gone()
        data, content_type = await service.read(receipt.key)
        return Response(data, media_type=content_type, headers={"Content-Location": url_of(request, receipt.key)})

    both_methods("/create_and_upload_image", create_and_upload_image, "Text to image, stored")
    both_methods("/make_image", make_image, "Text to image, answered")
    return routes


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or `None` when the client went away first, which cancels it. Read the body before."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        await watching  # a body that is too long is told here; its end is the client's
        return None
    except asyncio.CancelledError:
        # The server program ends the calls that outlast its grace; the caller should hear why.
        raise NotReady("The server is going down.", retry_after=5) from None
    finally:
        working.cancel()
        watching.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
