"""Loads input images, lays them out on the model's canvas, and composes the output image."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.interfaces import DecodeImage, FetchImage
from stable_diffusion_server.generation.limits import check_extended_size
from stable_diffusion_server.generation.resolver import ResolvedRequest, prompts_for_model
from stable_diffusion_server.generation.single_flight import SingleFlight
from stable_diffusion_server.generation.tiling import tiling_lack
from stable_diffusion_server.imaging import (
    Canvas,
    CropBox,
    Pixels,
    binarize_mask,
    canny,
    cover_cells,
    crop_around,
    crop_to_size,
    extend_image,
    extend_mask,
    feather_mask,
    fill_masked,
    fit_image,
    paste_back,
    plan_canvas,
    resize_image,
    shrink_to_area,
    to_canvas,
    to_mask,
)
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import (
    Caller,
    DiffusionRequest,
    GenerationRequest,
    ImageArray,
    ImageInput,
    MaskMode,
    RequestWarning,
)

# Layouts that are made at a time, each on one of asyncio's threads, of which there are four more than cores. Filling
# a mask of 2048 × 2048 pixels takes 8 s there, and reading the bucket needs these threads too.
_LAYOUTS = 4


@dataclass(frozen=True, slots=True)
class CropRegion:
    """The part of an image that is generated: its box, the whole image and mask, and the size it is generated at."""

    box: CropBox
    image: Pixels
    mask: Pixels
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The request to run, and the data to compose the output image.

    `width` and `height` are those of the output, in pixels. With `image` and `mask` (uint8, height × width × 3 and
    height × width) the generated image replaces `image` where the mask is not 0. With `crop` the generated image is a
    part of a larger image, and `compose_output` pastes it back there.
    """

    request: DiffusionRequest
    canvas: Canvas
    width: int
    height: int
    image: Pixels | None
    mask: Pixels | None
    warnings: tuple[RequestWarning, ...]
    crop: CropRegion | None = None

    def compose_output(self, drawn: Pixels) -> Pixels:
        """Return the output image for the image generated on the canvas (both uint8, height × width × 3)."""
        if self.crop is not None:
            part = crop_to_size(drawn, self.crop.width, self.crop.height, resample=self.canvas.resampled)
            return paste_back(self.crop.box.paste(part, self.crop.image), self.crop.image, self.crop.mask)
        sized = crop_to_size(drawn, self.width, self.height, resample=self.canvas.resampled)
        return sized if self.image is None or self.mask is None else paste_back(sized, self.image, self.mask)


def lay_out_images(
    resolved: ResolvedRequest,
    image: Pixels | None = None,
    mask: Pixels | None = None,
    references: Sequence[Pixels] = (),
) -> ImageLayout:
    """Return the layout of a request with its decoded images (uint8, height × width × 3). Raises `InvalidInput`."""
    request, parameters, spec = resolved.request, resolved.parameters, resolved.parameters.spec
    whole_image, whole_mask, box = image, None, None
    if image is not None:
        mask_on_image = _mask_over(image, mask, request.mask)
        image, mask_on_image = whole_image, whole_mask = _extended(request, image, mask_on_image)
        image, mask_on_image, box = _fit_inputs(request, image, mask_on_image)
        height, width = image.shape[:2]
    elif request.width is not None and request.height is not None:
        width, height, mask_on_image = request.width, request.height, None
    elif references:  # an edit without a size has that of its first one
        (height, width), mask_on_image = references[0].shape[:2], None
    else:
        raise ValueError("an order without an image has a size")
    canvas = _canvas_for(request, spec, width, height)
    on_canvas = _image_on_canvas(resolved, image, mask_on_image, canvas)
    job = DiffusionRequest(
        task=request.task,
        model=spec.name,
        revision=spec.revision_for(edges=parameters.canny),
        **prompts_for_model(parameters),
        width=canvas.width,
        height=canvas.height,
        seed=resolved.seed,
        num_inference_steps=parameters.num_inference_steps,
        guidance_scale=parameters.guidance_scale,
        scheduler=parameters.scheduler,
        image=None if on_canvas is None else ImageArray(on_canvas),
        mask=_mask_on_canvas(request, mask_on_image, canvas),
        control=ImageArray(canny(on_canvas, request.canny_low, request.canny_high))
        if parameters.canny and on_canvas is not None
        else None,
        strength=parameters.strength,
        control_scale=parameters.control_scale,
        refine=request.refine and parameters.num_inference_steps > 1,  # a single step leaves nothing to refine
        loras=request.loras,
        lora_parts=request.lora_parts,
        alone=request.alone,
        lora_digests=resolved.lora_digests,
        references=tuple(ImageArray(shrink_to_area(pixels, spec.reference_pixels)) for pixels in references),
        extra=request.extra,
        sampling=parameters.sampling,
        tiling=request.tiling,
        soft=mask_on_image is not None and request.mask_mode is MaskMode.SOFT,
    )
    blend = None if mask_on_image is None else _blend(request, mask_on_image)
    crop = None
    if box is not None and whole_image is not None and whole_mask is not None:
        crop = CropRegion(box, whole_image, _blend(request, whole_mask), width, height)
    resampling = resampling_warnings(spec, width, height)
    if crop is not None:
        height, width = crop.image.shape[:2]
    kept_image = image if mask_on_image is not None else None
    return ImageLayout(job, canvas, width, height, kept_image, blend, resampling, crop)


@contextmanager
def fields_as_sent(request: GenerationRequest) -> Iterator[None]:
    """Name input images in errors by the parameters of the request; families name `image`, `mask`, `references[0]`."""
    given = {"image": request.image, "mask": request.mask}
    given |= {f"references[{number}]": source for number, source in enumerate(request.references)}
    names = {name: source.parameter for name, source in given.items() if source is not None}
    try:
        yield
    except InvalidInput as error:
        if not any(field in names for field, _ in error.faults):
            raise
        faults = [(names.get(field, field), sentence) for field, sentence in error.faults]
        raise InvalidInput.from_faults(faults) from error


def _mask_over(image: Pixels, mask: Pixels | None, source: ImageInput | None) -> Pixels | None:
    """Return the mask in the size of the image. Raises `InvalidInput` if it covers nothing."""
    if mask is None or source is None:
        return None
    scaled = to_mask(mask, image.shape[1], image.shape[0])
    scaled = 255 - scaled if source.inverted else scaled
    if not scaled.any():
        lack = "has no transparent part" if source.transparency else "covers nothing"
        lack = lack if source.transparency or source.inverted else "is black all over"
        raise InvalidInput(f"{source.parameter} {lack}: nothing is to be repainted.", field=source.parameter)
    return scaled


def _canvas_for(request: GenerationRequest, spec: ModelSpec, width: int, height: int) -> Canvas:
    """Return the canvas of this size. Raises `InvalidInput` if a seamless image would be cut out of it."""
    if request.tiling is not None and (lack := tiling_lack(request.tiling, spec, width, height)):
        raise InvalidInput(f"tiling: {lack}", field="tiling")
    return plan_canvas(width, height, spec.native_pixels, spec.min_side)


def _extended(request: GenerationRequest, image: Pixels, mask: Pixels | None) -> tuple[Pixels, Pixels | None]:
    """Return image and mask with the new sides, all of which the mask covers; as they are without an extension."""
    if request.extend is None:
        return image, mask
    mask = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
    return extend_image(image, request.extend), extend_mask(mask, request.extend)


def _image_on_canvas(
    resolved: ResolvedRequest, image: Pixels | None, mask: Pixels | None, canvas: Canvas
) -> Pixels | None:
    """Return the image as the model gets it, with its masked part filled."""
    if image is None:
        return None
    if mask is not None:
        image = fill_masked(image, mask, resolved.request.fill, resolved.seed)
    return to_canvas(image, canvas)


def _mask_on_canvas(request: GenerationRequest, mask: Pixels | None, canvas: Canvas) -> ImageArray | None:
    """Return what the model repaints: black and white, or a soft mask's levels; whole latents of extended sides."""
    if mask is None:
        return None
    soft = request.mask_mode is MaskMode.SOFT
    levels = to_canvas(feather_mask(mask, request.feather) if soft else mask, canvas, fill=0)
    levels = levels if soft else binarize_mask(levels)
    if request.extend is not None:
        levels = np.maximum(levels, cover_cells(np.where(levels == 255, levels, np.uint8(0))))
    return ImageArray(levels)


def _blend(request: GenerationRequest, mask: Pixels) -> Pixels:
    """Return the weights of the new image over the old one; a soft mask was blended by the model."""
    soft = request.mask_mode is MaskMode.SOFT
    return feather_mask(binarize_mask(mask) if soft else mask, request.feather)


def _fit_inputs(
    request: GenerationRequest, image: Pixels, mask: Pixels | None
) -> tuple[Pixels, Pixels | None, CropBox | None]:
    """Return image and mask at the size to generate, and the crop box if that is only a part of the image."""
    if mask is not None and request.only_masked is not None:
        height, width = image.shape[:2]
        drawn_width, drawn_height = request.width or width, request.height or height
        box = crop_around(mask, request.only_masked, drawn_width / drawn_height)
        image, mask = box.crop(image), box.crop(mask)
        return resize_image(image, drawn_width, drawn_height), resize_image(mask, drawn_width, drawn_height), box
    if request.width is not None and request.height is not None:
        image = fit_image(image, request.width, request.height, request.fit)
        mask = fit_image(mask, request.width, request.height, request.fit) if mask is not None else None
    return image, mask, None


def resampling_warnings(spec: ModelSpec, width: int, height: int) -> tuple[RequestWarning, ...]:
    """Return a warning if the model generates another size, which is resampled to this one (in pixels)."""
    canvas = plan_canvas(width, height, spec.native_pixels, spec.min_side)
    if not canvas.resampled:
        return ()
    drawn = f"{canvas.width} × {canvas.height}"
    return (
        RequestWarning("resampled", f"{spec.name} draws this best at {drawn}; it was scaled to {width} × {height}."),
    )


class InputLoader:
    """Loads the input images of requests; extended ones have sides of up to `max_side` pixels. For one event loop."""

    def __init__(self, fetch: FetchImage, decode: DecodeImage, max_side: int) -> None:
        self._max_side = max_side
        self._fetch = fetch
        self._decode = decode
        self._downloads: SingleFlight[bytes] = SingleFlight()
        self._layouts = FairLimiter(_LAYOUTS)

    async def fetch_files(
        self, request: GenerationRequest, fetched: Mapping[str, bytes], caller: Caller
    ) -> dict[str, bytes]:
        """Download the request's URLs. Returns the files by parameter; reuses the files in `fetched`."""
        remote = [source for source in request.sources if source.url is not None and source.parameter not in fetched]
        data = await asyncio.gather(*(self._download(source, caller.share) for source in remote))
        return {**fetched, **{source.parameter: file for source, file in zip(remote, data, strict=True)}}

    async def _download(self, source: ImageInput, share: str) -> bytes:
        """Download the file at a URL. Concurrent downloads of the same URL by one caller share one task.

        Callers do not share a task, because a download waits in the fair queue of the caller that started it.
        """
        url, parameter = source.url or "", source.parameter
        data, _ = await self._downloads.join(
            f"{share} {url}", parameter, lambda _: self._fetch(url, parameter, share=share)
        )
        return data

    async def decode_image(
        self, request: GenerationRequest, fetched: Mapping[str, bytes], share: str
    ) -> tuple[bytes, Pixels]:
        """Return the file of the request's image and its pixels. Raises `InvalidInput` without an image."""
        if request.image is None:
            raise InvalidInput("image is missing.", field="image")
        data = _file_of(request.image, fetched)
        return data, await self._decode(data, request.image.parameter, share=share)

    async def decode(self, source: ImageInput, fetched: Mapping[str, bytes], share: str) -> Pixels:
        """Return the pixels of an input image (uint8, height × width × 3), a mask's transparency as its levels."""
        data = _file_of(source, fetched)
        return await self._decode(data, source.parameter, transparency=source.transparency, share=share)

    async def lay_out(self, resolved: ResolvedRequest, fetched: Mapping[str, bytes], share: str) -> ImageLayout:
        """Decode the input images and place them on the model's canvas."""

        async def pixels_of(source: ImageInput | None) -> Pixels | None:
            return None if source is None else await self.decode(source, fetched, share)

        request = resolved.request
        sources = (request.image, request.mask, *request.references)
        image, mask, *references = await asyncio.gather(*map(pixels_of, sources))
        if request.extend is not None and image is not None:
            check_extended_size(request.extend, image.shape[1], image.shape[0], self._max_side)
        async with self._layouts.hold(share):
            known = [pixels for pixels in references if pixels is not None]
            work = asyncio.ensure_future(asyncio.to_thread(lay_out_images, resolved, image, mask, known))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # the thread continues if the caller is cancelled
                raise


def _file_of(source: ImageInput, fetched: Mapping[str, bytes]) -> bytes:
    return source.data if source.data is not None else fetched[source.parameter]
