"""Lays out control images: the picture of each unit, made its control image, at the size of the canvas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.generation.control_units import ResolvedControl
from stable_diffusion_server.generation.image_prompts import prompt_images
from stable_diffusion_server.generation.layout import ImageLayout, InputLoader
from stable_diffusion_server.generation.preprocessing import ImagePreprocessor
from stable_diffusion_server.generation.request_resolution import RequestResolver
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.imaging import Pixels, crop_to_size, fit_image, resize_image, to_canvas, to_mask
from stable_diffusion_server.types import (
    Caller,
    ControlImage,
    ControlKind,
    Fit,
    GenerationRequest,
    ImageArray,
    ImageInput,
)

# Requests whose control images are made at a time; each has one decoded picture in memory.
_CONCURRENCY = 2

# Decodes the picture of an input to uint8, height × width × 3.
DecodeSource = Callable[[ImageInput], Awaitable[Pixels]]


@dataclass(frozen=True, slots=True)
class ControlLayout:
    """Makes control images, one unit after the other, and decodes image prompts. For one event loop."""

    inputs: InputLoader
    requests: RequestResolver
    preprocessor: ImagePreprocessor
    limiter: FairLimiter = field(default_factory=lambda: FairLimiter(_CONCURRENCY))

    async def images(self, request: GenerationRequest, caller: Caller) -> list[Pixels]:
        """Return the control images that a request without URLs follows, uint8, height × width × 3.

        Raises the errors of resolving, decoding and preprocessing.
        """
        resolved = await self.requests.resolve(await self.requests.admit(request, caller))
        layout = await self.inputs.lay_out(resolved, {}, caller.share)
        guided = await self.with_controls(layout, resolved, {}, caller.share)
        return [_as_drawn(control.image.pixels, layout) for control in guided.request.controls]

    async def with_controls(
        self, layout: ImageLayout, resolved: ResolvedRequest, fetched: Mapping[str, bytes], share: str
    ) -> ImageLayout:
        """Return the layout whose request has the control images, and the image prompts.

        Raises `InvalidInput`, and the errors of decoding.
        """
        images: list[ControlImage] = []

        async def decode(source: ImageInput) -> Pixels:
            return await self.inputs.decode(source, fetched, share)

        async with self.limiter.hold(share):
            for number, control in enumerate(resolved.parameters.controls):
                images.append(await self._image(layout, control, f"controls[{number}]", decode, share))
            prompts = await prompt_images(resolved.parameters.image_prompts, decode)
        return replace(layout, request=replace(layout.request, controls=tuple(images), image_prompts=prompts))

    async def _image(
        self, layout: ImageLayout, control: ResolvedControl, name: str, decode: DecodeSource, share: str
    ) -> ControlImage:
        unit = control.unit
        if unit.image is None:
            pixels = await asyncio.to_thread(_input_image, layout)
        else:
            given = await decode(unit.image)
            pixels = await asyncio.to_thread(_placed, given, control, layout)
        made = await self.preprocessor.preprocess(control.preprocessor, pixels, f"{name}.preprocess", share=share)
        mask = None
        if unit.mask is not None:
            where = await decode(unit.mask)
            mask = await asyncio.to_thread(_placed_mask, where, control, layout)
        elif control.kind is ControlKind.INPAINT and layout.request.mask is not None:
            mask = layout.request.mask
        return ControlImage(
            network=control.network,
            revision=control.revision,
            kind=control.kind,
            image=await asyncio.to_thread(_on_canvas, made, layout),
            mask=mask,
            weight=control.weight,
            start=unit.start,
            end=unit.end,
            mode=unit.mode,
        )


def _input_image(layout: ImageLayout) -> Pixels:
    """Return the request's input image on the canvas, without what fills its mask."""
    if layout.image is not None:
        return to_canvas(layout.image, layout.canvas)
    if layout.request.image is None:
        raise ValueError("a unit without an image has that of its request")
    return layout.request.image.pixels


def _placed(pixels: Pixels, control: ResolvedControl, layout: ImageLayout, fill: int | None = None) -> Pixels:
    """Return a picture of its own size, or a mask, on the canvas: over the image that is drawn, or its drawn part."""
    fit = Fit(control.unit.resize.value)
    if layout.crop is None:
        return to_canvas(fit_image(pixels, layout.width, layout.height, fit), layout.canvas, fill=fill)
    whole_height, whole_width = layout.crop.image.shape[:2]
    part = layout.crop.box.crop(fit_image(pixels, whole_width, whole_height, fit))
    drawn = resize_image(np.ascontiguousarray(part), layout.crop.width, layout.crop.height)
    return to_canvas(drawn, layout.canvas, fill=fill)


def _placed_mask(pixels: Pixels, control: ResolvedControl, layout: ImageLayout) -> ImageArray:
    levels = to_mask(pixels, pixels.shape[1], pixels.shape[0])
    return ImageArray(_placed(levels, control, layout, fill=0))


def _on_canvas(made: Pixels, layout: ImageLayout) -> ImageArray:
    return ImageArray(resize_image(made, layout.canvas.width, layout.canvas.height))


def _as_drawn(pixels: Pixels, layout: ImageLayout) -> Pixels:
    """Return a control image at the size of the image that is drawn."""
    width, height = (layout.width, layout.height) if layout.crop is None else (layout.crop.width, layout.crop.height)
    return crop_to_size(pixels, width, height, resample=layout.canvas.resampled)
