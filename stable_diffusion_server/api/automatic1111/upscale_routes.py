"""Routes of AUTOMATIC1111's API that enlarge images: `extra-single-image` and `extra-batch-images`."""

from __future__ import annotations

import html
import threading
from dataclasses import dataclass, field
from typing import Annotated
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.image_work import SIDE_MAX, ImageWorker, json_of, read_body
from stable_diffusion_server.api.automatic1111.options import CallerOptions, file_format_of
from stable_diffusion_server.api.automatic1111.progress import TaskTracker, TrackedTask
from stable_diffusion_server.api.concurrency import cancel_on_disconnect
from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.http_responses import client_closed_request
from stable_diffusion_server.api.openapi.document import coerced_properties, json_body
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.errors import InvalidInput, RequestCancelled
from stable_diffusion_server.generation import NAME_MAX, ImageUpscaler, UpscaleStopped
from stable_diffusion_server.imaging import Pixels, Resampling, blend

_FACTOR_MAX = 100
_IMAGES_MAX = 32

Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=SIDE_MAX)]
Name = Annotated[str, Field(max_length=NAME_MAX)]


class ExtrasParams(BaseModel):
    """Parameters of both routes. Further ones are ignored, as AUTOMATIC1111 does."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    resize_mode: int = Field(0, ge=0, le=1, description="0: by `upscaling_resize`; 1: to width and height.")
    upscaling_resize: float = Field(2, gt=0, le=_FACTOR_MAX, description="Factor.")
    upscaling_resize_w: Side = Field(512, description="Width in pixels.")
    upscaling_resize_h: Side = Field(512, description="Height in pixels.")
    upscaling_crop: bool = Field(True, description="Cut off what exceeds width and height.")
    upscaler_1: Name = Field("None", description="A name in `/sdapi/v1/upscalers`; `None` changes nothing.")
    upscaler_2: Name = Field("None", description="Second upscaler, mixed with the first.")
    extras_upscaler_2_visibility: Share = Field(0, description="Its share.")
    gfpgan_visibility: Share = Field(0, description="Without effect.")
    codeformer_visibility: Share = Field(0, description="Without effect.")

    def choose(self, upscaler: ImageUpscaler) -> UpscalerChoice:
        """Return both upscalers; Lanczos stands for what cannot be used. Reads files."""
        names, notes = [], []
        for asked, parameter in ((self.upscaler_1, "upscaler_1"), (self.upscaler_2, "upscaler_2")):
            name = None if asked.strip().lower() in ("", "none") else asked
            try:
                names.append(name and upscaler.find(name, parameter).name)
            except InvalidInput as error:
                notes.append(f"{error.detail} Lanczos enlarges the image.")
                names.append(Resampling.LANCZOS.value)
        unused = [name for name in ("gfpgan_visibility", "codeformer_visibility") if getattr(self, name)]
        notes += [f"{name} is not honoured." for name in unused]
        if names[0] is None:
            notes.append("upscaler_1 is None, so the size is unchanged.")
        return UpscalerChoice(names[0], names[1], "".join(f"<p>{html.escape(note)}</p>" for note in notes))

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of the result in pixels for an input of this size."""
        wanted = self.upscaling_resize_w, self.upscaling_resize_h
        if self.resize_mode and self.upscaling_crop:
            return wanted
        scale = max(wanted[0] / width, wanted[1] / height) if self.resize_mode else self.upscaling_resize
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True, slots=True)
class UpscalerChoice:
    """The names of both upscalers, `None` for none. `report` is HTML that says what was ignored."""

    first: str | None
    second: str | None
    report: str


class SingleExtrasParams(ExtrasParams):
    """Parameters for one image."""

    image: str = Field("", description="The image in base64.")


class BatchImageParams(BaseModel):
    """One image of a batch."""

    data: str = Field(description="The image in base64.")
    name: Name = Field("", description="Name of its file.")


class BatchExtrasParams(ExtrasParams):
    """Parameters for several images."""

    images: list[BatchImageParams] = Field(alias="imageList", max_length=_IMAGES_MAX, description="The images.")


class Automatic1111ExtraImageBody(TypedDict):
    """An image in base64. `html_info` says what was ignored."""

    html_info: str
    image: str


class Automatic1111ExtraImagesBody(TypedDict):
    """Images in base64. `html_info` says what was ignored."""

    html_info: str
    images: list[str]


@dataclass(slots=True)
class _Enlargement:
    """Enlarges the images of a request one after the other on a thread, and counts their tiles for its caller."""

    upscaler: ImageUpscaler
    params: ExtrasParams
    choice: UpscalerChoice
    task: TrackedTask
    left: threading.Event = field(default_factory=threading.Event)

    def change(self, pixels: Pixels, width: int, height: int) -> Pixels:
        """Enlarge the next image. Raises `UpscaleStopped` after a tile if the caller left or interrupted."""
        progress = self.task.current
        first, second = self.choice.first, self.choice.second
        passes = 2 if second is not None and self.params.extras_upscaler_2_visibility else 1

        def enlarged(name: str, number: int) -> Pixels:
            def report(done: int, total: int) -> None:
                if self.left.is_set() or self.task.interrupted:
                    raise UpscaleStopped
                progress.step, progress.steps = number * total + done, passes * total

            return self.upscaler.enlarge(name, pixels, width, height, report)

        if first is not None:
            result = enlarged(first, 0)
            if second is not None and passes == 2:
                result = blend(result, enlarged(second, 1), self.params.extras_upscaler_2_visibility)
            pixels = result
        progress.done = True
        return pixels


@dataclass(frozen=True, slots=True)
class _Extras:
    """Answers both routes; `tasks` shows the progress of their requests by tiles."""

    worker: ImageWorker
    options: CallerOptions
    tasks: TaskTracker

    async def enlarged(
        self, request: Request, params: ExtrasParams, images: list[str], parameter: str
    ) -> tuple[list[str], str] | None:
        """Return the images and the report; `None` if the client disconnected. Raises `RequestCancelled`."""
        context, caller = self.worker.context, caller_of(request)
        choice = await run_in_threadpool(params.choose, context.upscaler)

        def size_of(width: int, height: int) -> tuple[int, int]:
            if choice.first is None:
                return width, height
            size = params.size_of(width, height)
            context.limits.check_upscaled(*size, parameter)
            return size

        with self.tasks.track(caller, f"task({uuid4().hex})", max(1, len(images))) as task:
            work = _Enlargement(context.upscaler, params, choice, task)

            async def change() -> list[str] | None:
                file_format = file_format_of(self.options.of(caller))
                try:
                    return await self.worker.change(request, images, parameter, size_of, work.change, file_format)
                except UpscaleStopped:
                    if task.interrupted:
                        raise RequestCancelled("The request was interrupted.") from None
                    return None  # nobody is there to read it

            try:
                done = await cancel_on_disconnect(request, change())
            finally:
                work.left.set()
        return None if done is None else (done, choice.report)


def add_upscale_routes(routes: APIRouter, worker: ImageWorker, options: CallerOptions, tasks: TaskTracker) -> None:
    """Add the routes that enlarge one image, and several."""
    extras = _Extras(worker, options, tasks)

    @routes.post(
        "/sdapi/v1/extra-single-image",
        summary="AUTOMATIC1111: enlarge an image",
        operation_id="sdapi_extra_single_image",
        openapi_extra=json_body(coerced_properties(SingleExtrasParams, worker.context.limits), "image"),
        response_model=None,
        responses={200: {"model": described(Automatic1111ExtraImageBody)}},
    )
    async def extra_single_image(request: Request) -> Response:
        """Enlarge an image by an upscaler."""
        params = await read_body(request, SingleExtrasParams, frozenset({"image"}))
        done = await extras.enlarged(request, params, [params.image] if params.image else [], "image")
        if done is None:
            return client_closed_request()
        images, report = done
        return await json_of({"html_info": report, "image": images[0]}, images)

    @routes.post(
        "/sdapi/v1/extra-batch-images",
        summary="AUTOMATIC1111: enlarge images",
        operation_id="sdapi_extra_batch_images",
        openapi_extra=json_body(coerced_properties(BatchExtrasParams, worker.context.limits), "imageList"),
        response_model=None,
        responses={200: {"model": described(Automatic1111ExtraImagesBody)}},
    )
    async def extra_batch_images(request: Request) -> Response:
        """Enlarge several images by an upscaler."""
        params = await read_body(request, BatchExtrasParams, frozenset({"imageList"}))
        done = await extras.enlarged(request, params, [image.data for image in params.images], "imageList")
        if done is None:
            return client_closed_request()
        images, report = done
        return await json_of({"html_info": report, "images": images}, images)
