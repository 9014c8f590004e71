"""A plan and its pictures become a scene: the job to draw, and the way back from what was drawn. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.image_processing import (
    Canvas,
    Pixels,
    canny,
    feathered,
    paste_back,
    plan_canvas,
    to_canvas,
    to_mask,
    to_size,
    whole,
)
from stable_diffusion_server.orders import Job, Picture, Warned
from stable_diffusion_server.pipelines.catalog import ModelFacts
from stable_diffusion_server.resolving import Plan


@dataclass(frozen=True, slots=True)
class Scene:
    """A plan with its pictures: the job to draw, and how what is drawn becomes the picture that was asked for.

    `width` and `height` are the picture's, in pixels. With `image` and `mask` (uint8, height × width × 3 and height ×
    width) what is drawn is laid over the image where the mask is not 0.
    """

    job: Job
    canvas: Canvas
    width: int
    height: int
    image: Pixels | None
    mask: Pixels | None
    warnings: tuple[Warned, ...]

    def finished(self, drawn: Pixels) -> Pixels:
        """The picture asked for from the one drawn on the canvas (both uint8, height × width × 3)."""
        sized = to_size(drawn, self.width, self.height, resample=self.canvas.resampled)
        return sized if self.image is None or self.mask is None else paste_back(sized, self.image, self.mask)


def compose(plan: Plan, image: Pixels | None = None, mask: Pixels | None = None) -> Scene:
    """The scene of a plan with its decoded pictures (uint8, height × width × 3). Raises `InvalidInput`."""
    order, words, facts = plan.order, plan.words, plan.words.facts
    if image is not None:
        height, width = image.shape[:2]
    elif order.width is not None and order.height is not None:
        width, height = order.width, order.height
    else:
        raise ValueError("an order without an image has a size")
    canvas = plan_canvas(width, height, facts.native_pixels, facts.floor)
    kept = to_mask(mask, width, height) if mask is not None else None
    if kept is not None and order.mask is not None and not kept.any():
        raise InvalidInput(
            f"{order.mask.parameter} is black all over: nothing is to be repainted.", field=order.mask.parameter
        )
    seen = to_canvas(image, canvas) if image is not None else None
    job = Job(
        task=order.task,
        model=facts.name,
        revision=facts.revision,
        prompt=words.prompt,
        negative_prompt=words.negative_prompt,
        width=canvas.width,
        height=canvas.height,
        seed=plan.seed,
        num_inference_steps=words.num_inference_steps,
        guidance_scale=words.guidance_scale,
        scheduler=words.scheduler,
        image=Picture(seen) if seen is not None else None,
        mask=Picture(whole(to_canvas(kept, canvas, fill=0))) if kept is not None else None,
        control=Picture(canny(seen, order.canny_low, order.canny_high)) if words.canny and seen is not None else None,
        strength=words.strength,
        control_scale=words.control_scale,
        refine=order.refine and words.num_inference_steps > 1,  # a single step leaves nothing to refine
        loras=order.loras,
        alone=order.alone,
    )
    soft = feathered(kept, order.feather) if kept is not None else None
    return Scene(
        job,
        canvas,
        width,
        height,
        image if kept is not None else None,
        soft,
        resampling_told(facts, width, height),
    )


def resampling_told(facts: ModelFacts, width: int, height: int) -> tuple[Warned, ...]:
    """The warning for a size in pixels that the model does not draw itself, if it is one."""
    canvas = plan_canvas(width, height, facts.native_pixels, facts.floor)
    if not canvas.resampled:
        return ()
    drawn = f"{canvas.width} × {canvas.height}"
    return (Warned("resampled", f"{facts.name} draws this best at {drawn}; it was scaled to {width} × {height}."),)
