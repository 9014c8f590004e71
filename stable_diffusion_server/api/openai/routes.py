"""The doors `/v1/images/generations`, `/v1/images/edits` and `/v1/models`, for OpenAI's clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from stable_diffusion_server.api.aside import run_if_large
from stable_diffusion_server.api.concurrency import cancel_on_disconnect, disconnection
from stable_diffusion_server.api.dependencies import caller_of, scope_to_caller
from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.api.dispatch import RequestDispatcher
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.openai import responses
from stable_diffusion_server.api.openai.protocol import EditImageParams, GenerateImagesParams, ImagesParams
from stable_diffusion_server.api.openai.responses import GeneratedImage
from stable_diffusion_server.api.openai.streaming import EventStream, PartialImages
from stable_diffusion_server.api.problems import client_gone
from stable_diffusion_server.api.schemas.params import read_as
from stable_diffusion_server.api.schemas.wire import documented
from stable_diffusion_server.api.together import gather_or_cancel
from stable_diffusion_server.errors import InvalidInput, NotFound, TooLarge
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.imaging import Pixels, encode_image
from stable_diffusion_server.types import (
    Caller,
    EngineEventKind,
    Format,
    GenerationProgress,
    GenerationRequest,
    GenerationResult,
)

UrlOf = Callable[[Request, str], str]

_PREVIEW_QUALITY = 80


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request: its parameters, an order for each picture, and who asks."""

    parameters: ImagesParams
    orders: list[GenerationRequest]
    caller: Caller
    kind: str


def openai_router(
    service: GenerationService, answering: RequestDispatcher, house: DialectContext, url_of: UrlOf
) -> APIRouter:
    """The doors over a service; `url_of` makes the URL of a key for the client at hand.

    A request for one picture that is not streamed may be answered by a job, and once for its idempotency key.
    """
    routes = APIRouter(tags=["openai"], prefix="/v1")

    async def asked(request: Request, schema: type[ImagesParams], kind: str) -> Response:
        parameters = await read_as(schema, request)
        caller = caller_of(request)
        orders = [scope_to_caller(caller, order) for order in parameters.orders(house)]
        what = _Asked(parameters, orders, caller, kind)
        if len(orders) == 1 and not parameters.stream:

            async def render(request: Request, receipt: GenerationResult, file: bytes) -> Response:
                return await _told(house, what, [GeneratedImage(receipt, url_of(request, receipt.key), file)])

            return await answering.dispatch(request, orders[0], render, picture=parameters.as_text)
        if request.headers.get("idempotency-key") is not None:
            raise InvalidInput("Idempotency-Key is for one picture that is not streamed.", field="Idempotency-Key")
        return await (_streamed if parameters.stream else _answered)(request, service, house, url_of, what)

    @routes.post(
        "/images/generations",
        summary="OpenAI: draw pictures",
        operation_id="create_image",
        openapi_extra=documented(GenerateImagesParams, house.limits, "POST"),
        response_model=None,
    )
    async def generations(request: Request) -> Response:
        """Draw pictures from a prompt."""
        return await asked(request, GenerateImagesParams, "image_generation")

    @routes.post(
        "/images/edits",
        summary="OpenAI: draw a picture anew, or a part of it",
        operation_id="create_image_edit",
        openapi_extra=documented(EditImageParams, house.limits, "POST", ("multipart/form-data",)),
        response_model=None,
    )
    async def edits(request: Request) -> Response:
        """Draw a picture anew after a prompt, or what a mask leaves transparent."""
        return await asked(request, EditImageParams, "image_edit")

    @routes.get("/models", summary="OpenAI: the models", operation_id="list_models", response_model=None)
    async def models() -> Response:
        """The models, and the further names they are known by."""
        return JSONResponse(responses.models_answer(house.models.values(), house.aliases))

    @routes.get("/models/{model}", summary="OpenAI: one model", operation_id="retrieve_model", response_model=None)
    async def model(model: str) -> Response:
        """One model."""
        facts = house.models.get(house.aliases.get(model, model))
        if facts is None:
            raise NotFound(f"{model[:100]!r} is not a model here.", field="model")
        return JSONResponse(responses.model_answer(model, facts.revision))

    return routes


async def _answered(
    request: Request, service: GenerationService, house: DialectContext, url_of: UrlOf, what: _Asked
) -> Response:
    async def one(order: GenerationRequest) -> GeneratedImage:
        if what.parameters.as_text:
            receipt, file = await service.generate_with_bytes(order, caller=what.caller)
            return GeneratedImage(receipt, url_of(request, receipt.key), file)
        receipt = await service.generate(order, caller=what.caller)
        return GeneratedImage(receipt, url_of(request, receipt.key), b"")

    made = await cancel_on_disconnect(request, gather_or_cancel([one(order) for order in what.orders]))
    return client_gone() if made is None else await _told(house, what, made)


async def _told(house: DialectContext, what: _Asked, made: list[GeneratedImage]) -> Response:
    if sum(len(one.file) for one in made) * 4 // 3 > house.max_response_bytes:
        raise TooLarge("The pictures are too large for one answer; ask for fewer, or response_format url.")
    size = sum(len(one.file) for one in made)
    return await run_if_large(size, lambda: JSONResponse(responses.answer(what.parameters, made)))


async def _streamed(
    request: Request, service: GenerationService, house: DialectContext, url_of: UrlOf, what: _Asked
) -> Response:
    stream = EventStream(responses.failed)

    async def one(order: GenerationRequest) -> None:
        size = f"{order.width}x{order.height}" if order.width else "auto"
        encoding: list[asyncio.Task[None]] = []

        def send(index: int, preview: Pixels) -> None:
            encoding.append(asyncio.create_task(partial(index, preview)))

        async def partial(index: int, preview: Pixels) -> None:
            file_format = order.format or Format.PNG
            file = await asyncio.to_thread(encode_image, preview, file_format, _PREVIEW_QUALITY, None)
            stream.send(responses.partial(what.parameters, file, index, size, what.kind))

        partials = PartialImages(what.parameters.partial_images or 0, send)

        def watch(progress: GenerationProgress) -> None:
            if progress.kind is not EngineEventKind.QUEUED:
                stream.begin()
            partials.watch(progress)

        previews = bool(what.parameters.partial_images)
        receipt, file = await service.generate_with_bytes(order, caller=what.caller, watch=watch, previews=previews)
        await asyncio.gather(*encoding)
        made = GeneratedImage(receipt, url_of(request, receipt.key), file)
        stream.send(await run_if_large(len(file), responses.completed, what.parameters, made, what.kind))

    async def work() -> None:
        await gather_or_cancel([one(order) for order in what.orders])

    leaving = asyncio.create_task(disconnection(request))
    leaving.add_done_callback(lambda done: None if done.cancelled() else stream.stop())
    under_way = False
    try:
        under_way = await stream.start(work())
    finally:
        if not under_way:
            leaving.cancel()
    if not under_way:
        return client_gone()

    async def events() -> AsyncIterator[str]:
        try:
            async for event in stream.read():
                yield event
        finally:
            leaving.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
