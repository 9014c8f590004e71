"""Routes of the OpenAI API: `/v1/images/generations`, `edits` and `variations`, and `/v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.concurrency import (
    cancel_on_disconnect,
    gather_or_cancel,
    run_if_large,
    wait_for_disconnect,
)
from stable_diffusion_server.api.dependencies import DialectContext, UrlOf, caller_of, scope_to_caller
from stable_diffusion_server.api.dispatch import RequestDispatcher
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.openai import responses
from stable_diffusion_server.api.openai.edits import EditImageParams, VaryImageParams
from stable_diffusion_server.api.openai.protocol import GenerateImagesParams, ImagesParams, read_images_params
from stable_diffusion_server.api.openai.responses import (
    GeneratedImage,
    OpenAIImagesBody,
    OpenAIModelBody,
    OpenAIModelListBody,
)
from stable_diffusion_server.api.openai.streaming import EventStream, PartialImages
from stable_diffusion_server.api.openapi.document import EVENT_STREAM, parameters_openapi
from stable_diffusion_server.api.repeats import InFlightSeeds, claims_of
from stable_diffusion_server.api.schemas.responses import JobStatusBody, described
from stable_diffusion_server.errors import ModelNotFound, TooLarge
from stable_diffusion_server.generation import DecodeImage, GenerationService
from stable_diffusion_server.imaging import Pixels, encode_image
from stable_diffusion_server.jobs import IdempotencyClaim
from stable_diffusion_server.types import (
    Caller,
    EngineEventKind,
    Format,
    GenerationProgress,
    GenerationRequest,
    GenerationResult,
)

_PREVIEW_QUALITY = 80
_FILE_TYPES = ("multipart/form-data", "application/json")
# From this level on a pixel counts as transparent, as in a mask.
_TRANSPARENT = 224
_IMAGES: dict[int | str, dict[str, Any]] = {
    200: {"model": described(OpenAIImagesBody), "content": EVENT_STREAM},
    202: {"model": described(JobStatusBody)},
}


@dataclass(frozen=True, slots=True)
class _Call:
    """A request: its parameters, a generation for each image, and the first word of its events."""

    request: Request
    parameters: ImagesParams
    generations: list[GenerationRequest]
    kind: str


def openai_router(
    service: GenerationService,
    dispatcher: RequestDispatcher,
    context: DialectContext,
    url_of: UrlOf,
    decode: DecodeImage,
) -> APIRouter:
    """Return the routes. A request for one image without `stream` may run as a job."""
    routes = APIRouter(tags=["openai"], prefix="/v1")
    images = _ImageRoutes(service, dispatcher, context, url_of, InFlightSeeds())
    _add_model_routes(routes, context)
    read_generation = read_images_params(GenerateImagesParams, context)
    read_edit = read_images_params(EditImageParams, context)
    read_variation = read_images_params(VaryImageParams, context)

    @routes.post(
        "/images/generations",
        summary="OpenAI: generate images",
        operation_id="create_image",
        openapi_extra=parameters_openapi(GenerateImagesParams, context.limits, "POST"),
        response_model=None,
        responses=_IMAGES,
    )
    async def generations(request: Request, parameters: GenerateImagesParams = Depends(read_generation)) -> Response:
        """Generate images from a prompt."""
        return await images.answer(request, parameters, "image_generation")

    @routes.post(
        "/images/edits",
        summary="OpenAI: edit an image",
        operation_id="create_image_edit",
        openapi_extra=parameters_openapi(EditImageParams, context.limits, "POST", _FILE_TYPES),
        response_model=None,
        responses=_IMAGES,
    )
    async def edits(request: Request, parameters: EditImageParams = Depends(read_edit)) -> Response:
        """Change an image according to a prompt, or only what a mask leaves transparent."""
        hole = parameters.file_with_hole
        if hole is not None and await _has_hole(hole, decode, caller_of(request)):
            parameters = parameters.with_own_mask()
        return await images.answer(request, parameters, "image_edit")

    @routes.post(
        "/images/variations",
        summary="OpenAI: vary an image",
        operation_id="create_image_variation",
        openapi_extra=parameters_openapi(VaryImageParams, context.limits, "POST", _FILE_TYPES),
        response_model=None,
        responses=_IMAGES,
    )
    async def variations(request: Request, parameters: VaryImageParams = Depends(read_variation)) -> Response:
        """Generate images like an image."""
        return await images.answer(request, parameters, "image_variation")

    return routes


async def _has_hole(file: bytes, decode: DecodeImage, caller: Caller) -> bool:
    """Return whether an image file has transparent parts. Raises the errors of decoding, for `image`."""
    transparency = await decode(file, "image", transparency=True, share=caller.share)
    return bool(transparency.max() >= _TRANSPARENT)


def _add_model_routes(routes: APIRouter, context: DialectContext) -> None:
    @routes.get(
        "/models",
        summary="OpenAI: the models",
        operation_id="list_models",
        response_model=None,
        responses={200: {"model": described(OpenAIModelListBody)}},
    )
    async def models(request: Request) -> Response:
        """List the models that you may use, and their aliases."""
        return JSONResponse(responses.models_body(context.for_caller(caller_of(request))))

    @routes.get(
        "/models/{model:path}",
        summary="OpenAI: one model",
        operation_id="retrieve_model",
        response_model=None,
        responses={200: {"model": described(OpenAIModelBody)}},
    )
    async def model(request: Request, model: str) -> Response:
        """Return one model."""
        own = context.for_caller(caller_of(request))
        if own.find_model(model) is None:
            raise own.refusal(model, ModelNotFound)
        return JSONResponse(responses.model_body(model, own))


@dataclass(frozen=True, slots=True)
class _ImageRoutes:
    """Answers requests for images: by the dispatcher, all at once, or as a stream."""

    service: GenerationService
    dispatcher: RequestDispatcher
    context: DialectContext
    url_of: UrlOf
    seeds: InFlightSeeds

    async def answer(self, request: Request, parameters: ImagesParams, kind: str) -> Response:
        caller = caller_of(request)
        context = self.context.for_caller(caller)
        generations = [scope_to_caller(caller, one) for one in parameters.to_requests(context)]
        call = _Call(request, parameters, generations, kind)
        if parameters.stream:
            return await self._streamed(call)
        async with self.seeds.hold(request, generations) as seeded:
            call = replace(call, generations=seeded)
            return await (self._one(call) if len(seeded) == 1 else self._all_at_once(call))

    async def _one(self, call: _Call) -> Response:
        async def render(request: Request, result: GenerationResult, file: bytes) -> Response:
            return await self._rendered(call, [GeneratedImage(result, self.url_of(request, result.key), file)])

        return await self.dispatcher.dispatch(
            call.request, call.generations[0], render, with_file=call.parameters.as_base64, joins=True
        )

    async def _all_at_once(self, call: _Call) -> Response:
        caller, with_file = caller_of(call.request), call.parameters.as_base64
        claims = await claims_of(self.dispatcher, call.request, call.generations, streams=False)

        async def generate(one: GenerationRequest, claim: IdempotencyClaim | None) -> tuple[GeneratedImage, bool]:
            async def work() -> tuple[GenerationResult, bytes]:
                if with_file:
                    return await self.service.generate_with_bytes(one, caller=caller)
                return await self.service.generate(one, caller=caller), b""

            result, file, replayed = await self.dispatcher.generate_once(call.request, claim, work, with_file=with_file)
            return GeneratedImage(result, self.url_of(call.request, result.key), file), replayed

        work = gather_or_cancel([generate(*pair) for pair in zip(call.generations, claims, strict=True)])
        generated = await cancel_on_disconnect(call.request, work)
        if generated is None:
            return client_closed_request()
        response = await self._rendered(call, [image for image, _ in generated])
        if all(replayed for _, replayed in generated):
            response.headers["Idempotency-Replayed"] = "true"
        return response

    async def _rendered(self, call: _Call, images: list[GeneratedImage]) -> Response:
        size = sum(len(image.file) for image in images)
        if size * 4 // 3 > self.context.max_response_bytes:
            raise TooLarge("The pictures are too large for one answer; ask for fewer, or response_format url.")
        context = self.context.for_caller(caller_of(call.request))
        return await run_if_large(size, lambda: JSONResponse(responses.images_body(call.parameters, images, context)))

    async def _streamed(self, call: _Call) -> Response:
        stream = EventStream(responses.error_event)
        claims = await claims_of(self.dispatcher, call.request, call.generations, streams=True)

        async def work() -> None:
            async with self.seeds.hold(call.request, call.generations) as seeded:
                pairs = zip(seeded, claims, strict=True)
                await gather_or_cancel([self._generate_into(stream, call, *pair) for pair in pairs])

        disconnect = asyncio.create_task(wait_for_disconnect(call.request))
        disconnect.add_done_callback(lambda done: None if done.cancelled() else stream.stop())
        started = False
        try:
            started = await stream.start(work())
        finally:
            if not started:
                disconnect.cancel()
        if not started:
            return client_closed_request()

        async def events() -> AsyncIterator[bytes]:
            try:
                async for event in stream.read():
                    yield event
            finally:
                disconnect.cancel()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _generate_into(
        self, stream: EventStream, call: _Call, generation: GenerationRequest, claim: IdempotencyClaim | None
    ) -> None:
        """Generate an image, and send its previews and the image as events."""
        size = f"{generation.width}x{generation.height}" if generation.width else "auto"
        file_format = generation.format or Format.PNG
        encoding: list[asyncio.Task[None]] = []

        async def send_preview(index: int, preview: Pixels) -> None:
            file = await run_in_threadpool(encode_image, preview, file_format, _PREVIEW_QUALITY, None)
            stream.send(responses.partial_event(call.parameters, file, index, size, call.kind))

        wanted = call.parameters.partial_images or 0
        partials = PartialImages(
            wanted, lambda index, preview: encoding.append(asyncio.create_task(send_preview(index, preview)))
        )

        def watch(progress: GenerationProgress) -> None:
            if progress.kind is not EngineEventKind.QUEUED:
                stream.begin()
            partials.watch(progress)

        async def work() -> tuple[GenerationResult, bytes]:
            return await self.service.generate_with_bytes(
                generation, caller=caller_of(call.request), watch=watch, previews=wanted > 0
            )

        result, file, _ = await self.dispatcher.generate_once(call.request, claim, work, with_file=True)
        await asyncio.gather(*encoding)
        image = GeneratedImage(result, self.url_of(call.request, result.key), file)
        stream.send(await run_if_large(len(file), responses.completed_event, call.parameters, image, call.kind))
