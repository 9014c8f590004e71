"""The second pass of a request ("hires fix"): its image, enlarged by Lanczos, is drawn again at a lower strength."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from stable_diffusion_server.generation.executor import GenerationExecutor, SubmissionContext
from stable_diffusion_server.generation.layout import ImageLayout, lay_out_images
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.generation.seeds import one_later, wrapped
from stable_diffusion_server.generation.single_flight import ProgressListener
from stable_diffusion_server.generation.tiling import SECOND_PASS_AREAS
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import DiffusionRequest, Fit, GenerationProgress, GenerationRequest, MaskMode, Task

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


def has_second_pass(request: GenerationRequest) -> bool:
    """Return whether the request has a second pass."""
    return request.hires_width is not None and request.hires_height is not None


def second_pass_parameters(resolved: ResolvedRequest) -> tuple[int, float]:
    """Return the steps of the second pass, and which share of them is applied, 0..1."""
    request = resolved.request
    strength = _DEFAULT_STRENGTH if request.hires_strength is None else request.hires_strength
    return request.hires_steps or resolved.parameters.num_inference_steps, strength


async def draw_passes(
    executor: GenerationExecutor,
    resolved: ResolvedRequest,
    layout: ImageLayout,
    request: DiffusionRequest,
    context: SubmissionContext,
    listener: ProgressListener,
) -> DrawnPasses:
    """Draw `request`, whose layout is `layout`, and then its second pass if it has one.

    The image counts as that of the first request, with the times and warnings of both. Raises the errors of
    `GenerationExecutor.generate`.
    """
    enlarged = has_second_pass(resolved.request)
    steps, strength = second_pass_parameters(resolved)
    more = max(1, int(steps * strength)) if enlarged else 0
    image, coalesced = await executor.generate(request, context, PassListener(listener, layout, more=more))
    if not enlarged:
        return DrawnPasses(layout, image, coalesced)
    layout = await asyncio.to_thread(_lay_out_second_pass, resolved, layout, image)
    again = PassListener(listener, layout, done=request.num_inference_steps)
    second, _ = await executor.generate(layout.request, context, again)
    both = replace(
        second,
        request=image.request,
        timings=Counter(image.timings) + Counter(second.timings),
        warnings=tuple(dict.fromkeys((*image.warnings, *second.warnings))),
        batched=image.batched or second.batched,
    )
    return DrawnPasses(layout, both, coalesced)


def _lay_out_second_pass(
    resolved: ResolvedRequest, first: ImageLayout, image: CheckedImage[DecodedPixels]
) -> ImageLayout:
    """Return the layout of the second pass over the image of the first, with the prompts that the first one used."""
    request, spec = resolved.request, resolved.parameters.spec
    steps, strength = second_pass_parameters(resolved)
    again = replace(
        resolved,
        request=replace(
            request,
            task=Task.IMAGE_TO_IMAGE,
            width=request.hires_width,
            height=request.hires_height,
            image=None,
            mask=None,
            only_masked=None,
            extend=None,
            mask_mode=MaskMode.HARD,
            fit=Fit.CROP,
            refine=False,
        ),
        parameters=replace(
            resolved.parameters,
            spec=replace(spec, native_pixels=spec.native_pixels * SECOND_PASS_AREAS),
            num_inference_steps=steps,
            strength=strength,
            canny=False,
            sampling=one_later(resolved.parameters.sampling),
        ),
        # A seed of its own: adding the first pass's noise a second time is visible.
        seed=wrapped(image.request.seed + 1),
    )
    layout = lay_out_images(again, first.compose_output(image.product.pixels))
    drawn = image.request
    words = replace(
        layout.request,
        prompt=drawn.prompt,
        negative_prompt=drawn.negative_prompt,
        prompt_2=drawn.prompt_2,
        weighted=drawn.weighted,
    )
    return replace(layout, request=words)


def _compose(layout: ImageLayout, picture: Callable[[], Pixels]) -> Pixels:
    return layout.compose_output(picture())
