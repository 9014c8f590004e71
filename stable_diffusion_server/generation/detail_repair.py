"""Detail repair: finds parts of a finished image, such as faces, and draws each of them again at full size."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stable_diffusion_server.generation.executor import GenerationExecutor, SubmissionContext
from stable_diffusion_server.generation.layout import ImageLayout, lay_out_images
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.repair_requests import (
    DetectedPart,
    chosen_parts,
    part_mask,
    part_request,
)
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest, resolve_request
from stable_diffusion_server.generation.second_pass import DrawnPasses, PassListener
from stable_diffusion_server.generation.seeds import wrapped
from stable_diffusion_server.generation.single_flight import ProgressListener
from stable_diffusion_server.imaging import Canvas, Pixels
from stable_diffusion_server.types import DetailRepair, RequestWarning


@dataclass(frozen=True, slots=True)
class RepairedPixels:
    """The finished image with its parts drawn again, as `DecodedPixels`."""

    pixels: Pixels
    redecoded: bool
    tiled: bool
    warnings: tuple[str, ...]
    latents: None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Part `index` that a repair found, and its seed."""

    repair: DetailRepair
    index: int
    found: DetectedPart
    seed: int


class DetailRepairer:
    """Draws parts of images again, one after the other: a part sees those that were drawn before it."""

    def __init__(self, executor: GenerationExecutor, options: GenerationOptions) -> None:
        self._executor = executor
        self._options = options

    async def repair(
        self, resolved: ResolvedRequest, drawn: DrawnPasses, context: SubmissionContext, listener: ProgressListener
    ) -> DrawnPasses:
        """Return the image with the parts that the request's repairs found drawn again.

        Part `n` of all has the seed of the image plus `n + 2`. Raises the errors of the detector and of
        `GenerationExecutor.generate`.
        """
        image, layout = drawn.image, drawn.layout
        pixels = await asyncio.to_thread(layout.compose_output, image.product.pixels)
        warnings: list[RequestWarning] = []
        done, number = image.request.num_inference_steps, 0
        for place, repair in enumerate(resolved.request.repairs):
            (height, width), field = pixels.shape[:2], f"repairs[{place}].detector"
            found = await self._options.detector.detect(repair.detector, pixels, field, share=context.caller.share)
            parts = chosen_parts(found, repair, width, height)
            warnings.append(_repair_warning(repair, len(parts)))
            for index, part in enumerate(parts):
                again = _Part(repair, index, part, wrapped(image.request.seed + 2 + number))
                part_layout = await asyncio.to_thread(self._lay_out, resolved, again, pixels)
                progress = PassListener(listener, part_layout, done=done)
                second, _ = await self._executor.generate(part_layout.request, context, progress)
                pixels = await asyncio.to_thread(part_layout.compose_output, second.product.pixels)
                image, number = _joined(image, second), number + 1
                done += part_layout.request.num_inference_steps
        return DrawnPasses(_finished(layout, pixels, warnings), _with_pixels(image, pixels), drawn.coalesced)

    def _lay_out(self, resolved: ResolvedRequest, part: _Part, pixels: Pixels) -> ImageLayout:
        """Return the layout of a part of the image `pixels`, whose request has its final prompts. Blocks."""
        height, width = pixels.shape[:2]
        request = part_request(resolved.request, part.repair, part.index, resolved.parameters.spec)
        again = replace(resolve_request(request, self._options), seed=part.seed)
        layout = lay_out_images(again, pixels, part_mask(part.found, part.repair, width, height))
        return replace(layout, request=self._executor.fit_prompts(layout.request, again))


def _repair_warning(repair: DetailRepair, count: int) -> RequestWarning:
    """Return how many parts were drawn again."""
    if not count:
        return RequestWarning("nothing-found", f"{repair.detector} found nothing to draw again.")
    return RequestWarning("repaired", f"{repair.detector} found {count} of what was drawn again.")


def _joined(image: CheckedImage[DecodedPixels], part: CheckedImage[DecodedPixels]) -> CheckedImage[DecodedPixels]:
    """Return the image with the times and warnings of a part as well."""
    return replace(
        image,
        timings=Counter(image.timings) + Counter(part.timings),
        warnings=tuple(dict.fromkeys((*image.warnings, *part.warnings))),
        batched=image.batched or part.batched,
    )


def _finished(layout: ImageLayout, pixels: Pixels, warnings: Sequence[RequestWarning]) -> ImageLayout:
    """Return a layout whose output is the image as it is."""
    height, width = pixels.shape[:2]
    canvas = Canvas(width, height, resampled=False)
    drawn = replace(layout, canvas=canvas, width=width, height=height, warnings=(*layout.warnings, *warnings))
    return replace(drawn, image=None, mask=None, crop=None)


def _with_pixels(image: CheckedImage[DecodedPixels], pixels: Pixels) -> CheckedImage[DecodedPixels]:
    made = image.product
    return replace(image, product=RepairedPixels(pixels, made.redecoded, made.tiled, made.warnings))
