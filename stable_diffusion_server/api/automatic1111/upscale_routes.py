"""Routes of AUTOMATIC1111's API that enlarge images: `extra-single-image` and `extra-batch-images`."""

from __future__ import annotations

import html
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.image_work import SIDE_MAX, ImageWorker, json_of, read_body
from stable_diffusion_server.api.automatic1111.options import CallerOptions, file_format_of
from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.openapi.document import coerced_properties, json_body
from stable_diffusion_server.api.schemas.responses import described
from stable_diffusion_server.generation import NAME_MAX
from stable_diffusion_server.imaging import Pixels, Resampling, blend, upscale

_FACTOR_MAX = 100
_IMAGES_MAX = 32
_BY_NAME = {resampling.lower(): resampling for resampling in Resampling}

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

    def upscalers(self) -> tuple[Resampling | None, Resampling | None]:
        """Return both upscalers; Lanczos stands for unknown ones, `None` for none."""
        return _resampling(self.upscaler_1), _resampling(self.upscaler_2)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the size of the result in pixels for an input of this size."""
        if self.upscalers()[0] is None:
            return width, height
        wanted = self.upscaling_resize_w, self.upscaling_resize_h
        if self.resize_mode and self.upscaling_crop:
            return wanted
        scale = max(wanted[0] / width, wanted[1] / height) if self.resize_mode else self.upscaling_resize
        return max(1, round(width * scale)), max(1, round(height * scale))

    def change(self, pixels: Pixels, width: int, height: int) -> Pixels:
        """Enlarge an image."""
        first, second = self.upscalers()
        if first is None:
            return pixels
        enlarged = upscale(pixels, width, height, first)
        if second is None or not self.extras_upscaler_2_visibility:
            return enlarged
        return blend(enlarged, upscale(pixels, width, height, second), self.extras_upscaler_2_visibility)

    def report(self) -> str:
        """Return HTML that says what was done, and what was ignored."""
        names = (self.upscaler_1, self.upscaler_2)
        said = [
            f"{name} is not an upscaler here; Lanczos enlarges the image."
            for name, taken in zip(names, self.upscalers(), strict=True)
            if taken is not None and taken.lower() != name.strip().lower()
        ]
        said += [
            f"{name} is not honoured." for name in ("gfpgan_visibility", "codeformer_visibility") if getattr(self, name)
        ]
        if self.upscalers()[0] is None:
            said.append("upscaler_1 is None, so the size is unchanged.")
        return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in said)


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


def add_upscale_routes(routes: APIRouter, worker: ImageWorker, options: CallerOptions) -> None:
    """Add the routes that enlarge one image, and several."""

    async def enlarged(request: Request, params: ExtrasParams, images: list[str], name: str) -> list[str]:
        file_format = file_format_of(options.of(caller_of(request)))
        return await worker.change(request, images, name, params.size_of, params.change, file_format)

    @routes.post(
        "/sdapi/v1/extra-single-image",
        summary="AUTOMATIC1111: enlarge an image",
        operation_id="sdapi_extra_single_image",
        openapi_extra=json_body(coerced_properties(SingleExtrasParams, worker.context.limits), "image"),
        response_model=None,
        responses={200: {"model": described(Automatic1111ExtraImageBody)}},
    )
    async def extra_single_image(request: Request) -> Response:
        """Enlarge an image by resampling."""
        params = await read_body(request, SingleExtrasParams, frozenset({"image"}))
        images = await enlarged(request, params, [params.image] if params.image else [], "image")
        return await json_of({"html_info": params.report(), "image": images[0]}, images)

    @routes.post(
        "/sdapi/v1/extra-batch-images",
        summary="AUTOMATIC1111: enlarge images",
        operation_id="sdapi_extra_batch_images",
        openapi_extra=json_body(coerced_properties(BatchExtrasParams, worker.context.limits), "imageList"),
        response_model=None,
        responses={200: {"model": described(Automatic1111ExtraImagesBody)}},
    )
    async def extra_batch_images(request: Request) -> Response:
        """Enlarge several images by resampling."""
        params = await read_body(request, BatchExtrasParams, frozenset({"imageList"}))
        images = await enlarged(request, params, [image.data for image in params.images], "imageList")
        return await json_of({"html_info": params.report(), "images": images}, images)


def _resampling(name: str) -> Resampling | None:
    """Return the filter of an upscaler's name; Lanczos for an unknown one."""
    lowered = name.strip().lower()
    return None if lowered in ("", "none") else _BY_NAME.get(lowered, Resampling.LANCZOS)
