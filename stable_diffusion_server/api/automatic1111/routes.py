"""Routes of AUTOMATIC1111's API that generate images: `/sdapi/v1/txt2img` and `/sdapi/v1/img2img`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.automatic1111 import responses
from stable_diffusion_server.api.automatic1111.adetailer_routes import add_adetailer_routes
from stable_diffusion_server.api.automatic1111.checkpoint_routes import add_checkpoint_routes
from stable_diffusion_server.api.automatic1111.controlnet_routes import add_controlnet_routes
from stable_diffusion_server.api.automatic1111.generation_info import TaskImage
from stable_diffusion_server.api.automatic1111.gradio_routes import add_gradio_routes
from stable_diffusion_server.api.automatic1111.image_work import ImageWorker
from stable_diffusion_server.api.automatic1111.info_routes import (
    add_png_info_route,
    add_progress_routes,
    add_stop_routes,
)
from stable_diffusion_server.api.automatic1111.list_routes import add_list_routes, add_order_routes
from stable_diffusion_server.api.automatic1111.name_mapping import BOUNDED, renamed
from stable_diffusion_server.api.automatic1111.options import CallerOptions, add_option_routes, image_options
from stable_diffusion_server.api.automatic1111.progress import TaskTracker, TrackedTask, UnfinishedImage
from stable_diffusion_server.api.automatic1111.protocol import ParsedTask, expand_task, parse_task
from stable_diffusion_server.api.automatic1111.responses import Automatic1111ImagesBody
from stable_diffusion_server.api.automatic1111.task_params import NUMBERS, SEED_BOUNDS, Img2Img, Txt2Img
from stable_diffusion_server.api.automatic1111.upscale_routes import add_upscale_routes
from stable_diffusion_server.api.base64_images import EncodedPreviews
from stable_diffusion_server.api.concurrency import cancel_on_disconnect, gather_or_cancel, run_if_large
from stable_diffusion_server.api.dependencies import DialectContext, ModelChanges, UrlOf, caller_of, scope_to_caller
from stable_diffusion_server.api.dispatch import RequestDispatcher
from stable_diffusion_server.api.http_responses import JSONResponse, client_closed_request
from stable_diffusion_server.api.openapi.document import coerced_properties, json_body, set_bounds
from stable_diffusion_server.api.repeats import InFlightSeeds, claims_of, with_seed
from stable_diffusion_server.api.request_parsing import read_json
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.api.schemas.validation import raise_invalid
from stable_diffusion_server.errors import ServerError, TooLarge
from stable_diffusion_server.generation import DEFAULT_QUALITY, DecodeImage, GenerationService, RequestLimits
from stable_diffusion_server.imaging import Pixels, canny, encode_image, fit_image
from stable_diffusion_server.jobs import IdempotencyClaim
from stable_diffusion_server.types import Caller, Format, GenerationRequest, GenerationResult

A = TypeVar("A", bound=Txt2Img)


def automatic1111_router(
    service: GenerationService,
    dispatcher: RequestDispatcher,
    context: DialectContext,
    url_of: UrlOf,
    previews: EncodedPreviews,
    decode: DecodeImage,
    changes: ModelChanges,
) -> APIRouter:
    """Return all routes of the dialect; `url_of` makes the URL of an object key, `changes` loads and unloads models."""
    routes = APIRouter(tags=["automatic1111"])
    options = CallerOptions()
    images = _ImageTasks(service, dispatcher, context, url_of, decode, options)
    worker = ImageWorker(context, decode)

    @routes.post(
        "/sdapi/v1/txt2img",
        summary="AUTOMATIC1111: generate images",
        operation_id="sdapi_txt2img",
        openapi_extra=_request_openapi(Txt2Img, context.limits),
        response_model=None,
        responses={200: {"model": described(Automatic1111ImagesBody)}},
    )
    async def txt2img(request: Request) -> Response:
        """Generate images from a prompt."""
        return await images.answer(request, await _read(Txt2Img, request))

    @routes.post(
        "/sdapi/v1/img2img",
        summary="AUTOMATIC1111: change an image, or a part of it",
        operation_id="sdapi_img2img",
        openapi_extra=_request_openapi(Img2Img, context.limits, "init_images"),
        response_model=None,
        responses={200: {"model": described(Automatic1111ImagesBody)}},
    )
    async def img2img(request: Request) -> Response:
        """Change an image, or only what a mask covers."""
        return await images.answer(request, await _read(Img2Img, request))

    add_list_routes(routes, context, options)
    add_order_routes(routes)
    add_checkpoint_routes(routes, context, options, changes)
    add_progress_routes(routes, images.tasks, previews)
    add_stop_routes(routes, images.tasks)
    add_option_routes(routes, context, options)
    add_png_info_route(routes)
    add_upscale_routes(routes, worker, options, images.tasks)
    add_controlnet_routes(routes, worker)
    add_adetailer_routes(routes, context)
    add_gradio_routes(routes, context)
    return routes


@dataclass(frozen=True, slots=True)
class _ImageTasks:
    """Runs requests for images as tasks whose progress the caller can read."""

    service: GenerationService
    dispatcher: RequestDispatcher
    context: DialectContext
    url_of: UrlOf
    decode: DecodeImage
    options: CallerOptions
    tasks: TaskTracker = field(default_factory=TaskTracker)
    seeds: InFlightSeeds = field(default_factory=InFlightSeeds)

    async def answer(self, request: Request, params: Txt2Img) -> Response:
        """Generate the images of a request. Raises errors with the parameter names of this dialect."""
        try:
            return await self._generate(request, params)
        except ServerError as error:
            raise renamed(error) from error

    async def _generate(self, request: Request, params: Txt2Img) -> Response:
        caller = caller_of(request)
        # On a thread: it decodes images, parses long prompts, and looks into the LoRA folder.
        options = image_options(self.options.of(caller))
        context = self.context.for_caller(caller)
        parsed = await run_in_threadpool(parse_task, params, context, options)
        parsed = replace(parsed, generations=[scope_to_caller(caller, one) for one in parsed.generations])
        claims = await claims_of(self.dispatcher, request, parsed.generations, streams=False)
        name = params.force_task_id or f"task({uuid4().hex})"
        async with self.seeds.hold(request, parsed.generations) as held:
            # An idempotency key identifies the request without a seed.
            parsed = replace(parsed, generations=with_seed(held))
            if parsed.has_wildcards:
                parsed = await run_in_threadpool(expand_task, parsed, context)
            seeded = parsed.generations
            with self.tasks.track(caller, name, len(seeded)) as task:
                work = [
                    self._generate_one(request, number, one, claim, task)
                    for number, (one, claim) in enumerate(zip(seeded, claims, strict=True))
                ]
                generated = await cancel_on_disconnect(request, gather_or_cancel(work))
        if generated is None:
            return client_closed_request()
        images = [image for image in generated if image is not None]
        maps = await self._detected_maps(parsed, caller) if images else []
        size = sum(map(len, (*(image.file for image in images), *maps)))
        if size * 4 // 3 > self.context.max_response_bytes:
            raise TooLarge("The pictures are too large for one answer; send_images=false answers their addresses.")

        def render() -> Response:
            body = responses.images_body(parsed, images, maps, task.began, interrupted=task.interrupted)
            replayed = bool(images) and all(image.replayed for image in images)
            return JSONResponse(body, headers={"Idempotency-Replayed": "true"} if replayed else None)

        return await run_if_large(size, render)

    async def _generate_one(
        self,
        request: Request,
        number: int,
        generation: GenerationRequest,
        claim: IdempotencyClaim | None,
        task: TrackedTask,
    ) -> TaskImage | None:
        """Generate one image of a task, unfinished if it was stopped; `None` if it was not started by then."""

        def work() -> Awaitable[tuple[GenerationResult, bytes]]:
            return self.service.generate_with_bytes(
                generation,
                caller=caller_of(request),
                watch=lambda progress: task.watch(number, progress),
                previews=True,
                picture=lambda: task.images[number].wanted,
            )

        generated = await task.run(number, self.dispatcher.generate_once(request, claim, work, with_file=True))
        if generated is None:
            return None
        if isinstance(generated, UnfinishedImage):
            file = await run_in_threadpool(_encode, generated.compose, generation.format or Format.PNG)
            return TaskImage(generation, None, "", file, f"{generated.step} of {generated.steps} steps were drawn")
        result, file, replayed = generated
        return TaskImage(generation, result, self.url_of(request, result.key), file, replayed=replayed)

    async def _detected_maps(self, parsed: ParsedTask, caller: Caller) -> list[bytes]:
        """Return the control images that were followed as PNG, as the ControlNet extension does unless units refuse."""
        generation = parsed.generations[0]
        if any(parsed.maps):
            made = await self.service.controls.images(generation, caller)
            shown = [pixels for pixels, shows in zip(made, parsed.maps, strict=True) if shows]
            return [await run_in_threadpool(encode_image, one, Format.PNG, DEFAULT_QUALITY, None) for one in shown]
        if parsed.edges is None or not parsed.edges.shows_map or generation.image is None:
            return []
        pixels = await self.decode(generation.image.data or b"", generation.image.parameter, share=caller.share)

        def detect() -> Pixels:
            width, height = generation.width or pixels.shape[1], generation.height or pixels.shape[0]
            fitted = fit_image(pixels, width, height, generation.fit)
            return canny(fitted, generation.canny_low, generation.canny_high)

        return [await run_in_threadpool(_encode, detect, Format.PNG)]


def _encode(make: Callable[[], Pixels], file_format: Format) -> bytes:
    return encode_image(make(), file_format, DEFAULT_QUALITY, None)


def _request_openapi(model: type[Txt2Img], limits: RequestLimits, *required: str) -> dict[str, Any]:
    """Return the OpenAPI of a JSON body with the bounds in the settings; further members are allowed."""
    bounds = limits.bounds()
    properties = coerced_properties(model, limits, NUMBERS)
    set_bounds(properties["seed"], *SEED_BOUNDS)  # this dialect allows -1
    for name, ours in {**BOUNDED, "width": "width", "height": "height"}.items():
        if name in properties:
            set_bounds(properties[name], *bounds[ours])
    return json_body(properties, *required)


async def _read(model: type[A], request: Request) -> A:
    """Read a JSON body as parameters. Raises `MalformedRequest`, `UnsupportedMedia` and `InvalidInput`."""
    try:
        body = await read_json(request, model.pictures)
        return await run_if_large(len(await request.body()), model.model_validate, body)
    except ValidationError as error:
        raise_invalid(error, model)
