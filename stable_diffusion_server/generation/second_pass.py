"""The second pass of a request ("hires fix"): its image or latents, enlarged, are drawn again at a lower strength."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from stable_diffusion_server.generation.executor import GenerationExecutor, SubmissionContext
from stable_diffusion_server.generation.layout import ImageLayout, lay_out_images
from stable_diffusion_server.generation.limits import check_second_size, second_size
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.generation.seeds import SUBSEED, one_later, wrapped
from stable_diffusion_server.generation.single_flight import ProgressListener
from stable_diffusion_server.generation.tiling import SECOND_PASS_AREAS
from stable_diffusion_server.imaging import Pixels, fit_image
from stable_diffusion_server.types import (
    ControlImage,
    DiffusionRequest,
    Fit,
    GenerationProgress,
    ImageArray,
    LatentArray,
    MaskMode,
    Task,
)

# Enlarges an image to width and height with the upscaler of a name, for the caller of a share.
EnlargeImage = Callable[[str, Pixels, tuple[int, int], str], Awaitable[Pixels]]
_DEFAULT_STRENGTH = 0.75


@dataclass(frozen=True, slots=True, eq=False)
class PassListener:
    """Passes on the progress of one pass: `done` steps came before it, about `more` follow it.

    An unfinished picture is composed to the output size of the pass when it is read.
    """

    listener: ProgressListener
    layout: ImageLayout
    done: int = 0
    more: int = 0

    @property
    def wants_previews(self) -> bool:
        """Whether the listener wants previews."""
        return self.listener.wants_previews

    @property
    def wants_picture(self) -> bool:
        """Whether the listener wants the unfinished picture. Read on the engine's threads."""
        return self.listener.wants_picture

    def on_progress(self, progress: GenerationProgress) -> None:
        """Pass the report on."""
        picture = None if progress.picture is None else partial(_compose, self.layout, progress.picture)
        step, steps = progress.step + self.done, progress.steps + self.done + self.more
        self.listener.on_progress(replace(progress, step=step, steps=steps, picture=picture))


@dataclass(frozen=True, slots=True)
class DrawnPasses:
    """The image of the last pass with its layout. `coalesced`: an equal request was already running."""

    layout: ImageLayout
    image: CheckedImage[DecodedPixels]
    coalesced: bool


def second_pass_parameters(resolved: ResolvedRequest) -> tuple[int, float]:
    """Return the steps of the second pass, and which share of them is applied, 0..1."""
    request = resolved.request
    strength = _DEFAULT_STRENGTH if request.hires_strength is None else request.hires_strength
    return request.hires_steps or resolved.parameters.num_inference_steps, strength


async def draw_passes(
    executor: GenerationExecutor,
    enlarge: EnlargeImage,
    resolved: ResolvedRequest,
    layout: ImageLayout,
    request: DiffusionRequest,
    context: SubmissionContext,
    listener: ProgressListener,
) -> DrawnPasses:
    """Draw `request`, whose layout is `layout`, and then its second pass if it has one.

    The image counts as that of the first request, with the times and warnings of both. Raises `InvalidInput` for a
    second pass that is too large, and the errors of `GenerationExecutor.generate` and of `enlarge`.
    """
    if resolved.second is None:
        image, coalesced = await executor.generate(request, context, PassListener(listener, layout))
        return DrawnPasses(layout, image, coalesced)
    check_second_size(resolved.request, layout.width, layout.height, executor.max_side)
    steps, strength = second_pass_parameters(resolved)
    first = replace(request, keeps_latents=resolved.second.latents is not None)
    progress = PassListener(listener, layout, more=max(1, int(steps * strength)))
    image, coalesced = await executor.generate(first, context, progress)
    started, drawn = time.perf_counter(), image.product
    size, latents = second_size(resolved.request, layout.width, layout.height), None
    if resolved.second.latents is not None:
        if drawn.latents is None:
            raise ValueError("the first pass kept no latents")
        pixels, latents = None, LatentArray(drawn.latents, resolved.second.latents)
    else:
        pixels = await asyncio.to_thread(layout.compose_output, drawn.pixels)
        if resolved.second.upscaler is not None:
            pixels = await enlarge(resolved.second.upscaler.name, pixels, size, context.caller.share)
    layout = await asyncio.to_thread(_lay_out_second_pass, resolved, size, image.request, pixels)
    controls = await asyncio.to_thread(_enlarged_controls, first, layout.request)
    kept = replace(layout.request, latents=latents, controls=controls, image_prompts=first.image_prompts)
    layout = replace(layout, request=kept)
    if resolved.second.own is not None:
        own = await asyncio.to_thread(executor.fit_prompts, layout.request, resolved)
        layout = replace(layout, request=own)
    enlarged = {"enlarge": time.perf_counter() - started}
    again = PassListener(listener, layout, done=request.num_inference_steps)
    second, _ = await executor.generate(layout.request, context, again)
    both = replace(
        second,
        request=replace(image.request, keeps_latents=False),
        timings=Counter(image.timings) + Counter(enlarged) + Counter(second.timings),
        warnings=tuple(dict.fromkeys((*image.warnings, *second.warnings))),
        batched=image.batched or second.batched,
    )
    return DrawnPasses(layout, both, coalesced)


def _lay_out_second_pass(
    resolved: ResolvedRequest, size: tuple[int, int], drawn: DiffusionRequest, pixels: Pixels | None
) -> ImageLayout:
    """Return the layout of the second pass, of `size`, over the image that `drawn` made.

    `pixels` are `None` if it starts from latents. Without words of its own it has the prompts that the first pass used.
    """
    request, parameters, digests, plan = resolved.request, resolved.parameters, resolved.lora_digests, resolved.second
    if plan is not None and plan.own is not None:
        (request, parameters), digests = plan.own, plan.lora_digests
    steps, strength = second_pass_parameters(resolved)
    # One that was derived from the request is in the first pass's options only.
    known = dict(parameters.sampling)
    subseed = [pair for pair in resolved.parameters.sampling if pair[0] == SUBSEED and SUBSEED not in known]
    again = replace(
        resolved,
        request=replace(
            request,
            task=Task.IMAGE_TO_IMAGE,
            width=size[0],
            height=size[1],
            image=None,
            mask=None,
            only_masked=None,
            extend=None,
            mask_mode=MaskMode.HARD,
            fit=Fit.CROP,
            refine=False,
        ),
        parameters=replace(
            parameters,
            spec=replace(parameters.spec, native_pixels=parameters.spec.native_pixels * SECOND_PASS_AREAS),
            num_inference_steps=steps,
            strength=strength,
            canny=False,
            sampling=one_later((*parameters.sampling, *subseed)),
        ),
        lora_digests=digests,
        # A seed of its own: adding the first pass's noise a second time is visible.
        seed=wrapped(drawn.seed + 1),
    )
    layout = lay_out_images(again, pixels)
    if plan is not None and plan.own is not None:
        return layout
    words = replace(
        layout.request,
        prompt=drawn.prompt,
        negative_prompt=drawn.negative_prompt,
        prompt_2=drawn.prompt_2,
        weighted=drawn.weighted,
    )
    return replace(layout, request=words)


def _enlarged_controls(first: DiffusionRequest, second: DiffusionRequest) -> tuple[ControlImage, ...]:
    """Return the control images of the first pass in the size of the second one."""

    def enlarged(image: ImageArray) -> ImageArray:
        return ImageArray(fit_image(image.pixels, second.width, second.height, Fit.CROP))

    return tuple(
        replace(control, image=enlarged(control.image), mask=control.mask and enlarged(control.mask))
        for control in first.controls
    )


def _compose(layout: ImageLayout, picture: Callable[[], Pixels]) -> Pixels:
    return layout.compose_output(picture())
