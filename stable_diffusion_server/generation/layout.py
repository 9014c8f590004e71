"""A plan and its pictures become a scene: the job to draw, and the way back from what was drawn. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.imaging import (
    Canvas,
    CropBox,
    Pixels,
    binarize_mask,
    canny,
    crop_around,
    crop_to_size,
    feather_mask,
    fill_masked,
    fit_image,
    paste_back,
    plan_canvas,
    resize_image,
    to_canvas,
    to_mask,
)
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, GenerationRequest, ImageArray, RequestWarning


@dataclass(frozen=True, slots=True)
class CropRegion:
    """The part of a picture that is drawn: where it is, the whole picture and its mask, the size it is drawn at."""

    box: CropBox
    image: Pixels
    mask: Pixels
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """A plan with its pictures: the job to draw, and how what is drawn becomes the picture that was asked for.

    `width` and `height` are the picture's, in pixels. With `image` and `mask` (uint8, height × width × 3 and height ×
    width) what is drawn is laid over the image where the mask is not 0. With `around` that is a part of the
    picture, and is put back into it.
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
        """The picture asked for from the one drawn on the canvas (both uint8, height × width × 3)."""
        if self.crop is not None:
            part = crop_to_size(drawn, self.crop.width, self.crop.height, resample=self.canvas.resampled)
            return paste_back(self.crop.box.paste(part, self.crop.image), self.crop.image, self.crop.mask)
        sized = crop_to_size(drawn, self.width, self.height, resample=self.canvas.resampled)
        return sized if self.image is None or self.mask is None else paste_back(sized, self.image, self.mask)


def lay_out_images(plan: ResolvedRequest, image: Pixels | None = None, mask: Pixels | None = None) -> ImageLayout:
    """The scene of a plan with its decoded pictures (uint8, height × width × 3). Raises `InvalidInput`."""
    order, words, facts = plan.request, plan.parameters, plan.parameters.spec
    whole_image, whole_mask, box = image, None, None
    if image is not None:
        kept = to_mask(mask, image.shape[1], image.shape[0]) if mask is not None else None
        if kept is not None and order.mask is not None and order.mask.inverted:
            kept = 255 - kept
        if kept is not None and order.mask is not None and not kept.any():
            lack = "has no transparent part" if order.mask.transparency else "covers nothing"
            lack = lack if order.mask.transparency or order.mask.inverted else "is black all over"
            raise InvalidInput(
                f"{order.mask.parameter} {lack}: nothing is to be repainted.", field=order.mask.parameter
            )
        whole_mask = kept
        image, kept, box = _laid_out(order, image, kept)
        height, width = image.shape[:2]
    elif order.width is not None and order.height is not None:
        width, height, kept = order.width, order.height, None
    else:
        raise ValueError("an order without an image has a size")
    canvas = plan_canvas(width, height, facts.native_pixels, facts.min_side)
    shown = fill_masked(image, kept, order.fill, plan.seed) if image is not None and kept is not None else image
    seen = to_canvas(shown, canvas) if shown is not None else None
    job = DiffusionRequest(
        task=order.task,
        model=facts.name,
        revision=facts.revision_for(edges=words.canny),
        prompt=words.prompt,
        negative_prompt=words.negative_prompt,
        width=canvas.width,
        height=canvas.height,
        seed=plan.seed,
        num_inference_steps=words.num_inference_steps,
        guidance_scale=words.guidance_scale,
        scheduler=words.scheduler,
        image=ImageArray(seen) if seen is not None else None,
        mask=ImageArray(binarize_mask(to_canvas(kept, canvas, fill=0))) if kept is not None else None,
        control=ImageArray(canny(seen, order.canny_low, order.canny_high))
        if words.canny and seen is not None
        else None,
        strength=words.strength,
        control_scale=words.control_scale,
        refine=order.refine and words.num_inference_steps > 1,  # a single step leaves nothing to refine
        loras=order.loras,
        alone=order.alone,
        lora_digests=plan.lora_digests,
    )
    soft = feather_mask(kept, order.feather) if kept is not None else None
    around_it = None
    if box is not None and whole_image is not None and whole_mask is not None:
        around_it = CropRegion(box, whole_image, feather_mask(whole_mask, order.feather), width, height)
    resampling = resampling_warnings(facts, width, height)
    if around_it is not None:
        height, width = around_it.image.shape[:2]
    kept_image = image if kept is not None else None
    return ImageLayout(job, canvas, width, height, kept_image, soft, resampling, around_it)


def _laid_out(
    order: GenerationRequest, image: Pixels, mask: Pixels | None
) -> tuple[Pixels, Pixels | None, CropBox | None]:
    """The image and its mask at the size to draw, and the part of the image that is, where it is not all of it."""
    if mask is not None and order.only_masked is not None:
        height, width = image.shape[:2]
        drawn_width, drawn_height = order.width or width, order.height or height
        box = crop_around(mask, order.only_masked, drawn_width / drawn_height)
        image, mask = box.crop(image), box.crop(mask)
        return resize_image(image, drawn_width, drawn_height), resize_image(mask, drawn_width, drawn_height), box
    if order.width is not None and order.height is not None:
        image = fit_image(image, order.width, order.height, order.fit)
        mask = fit_image(mask, order.width, order.height, order.fit) if mask is not None else None
    return image, mask, None


def resampling_warnings(facts: ModelSpec, width: int, height: int) -> tuple[RequestWarning, ...]:
    """The warning for a size in pixels that the model does not draw itself, if it is one."""
    canvas = plan_canvas(width, height, facts.native_pixels, facts.min_side)
    if not canvas.resampled:
        return ()
    drawn = f"{canvas.width} × {canvas.height}"
    return (
        RequestWarning("resampled", f"{facts.name} draws this best at {drawn}; it was scaled to {width} × {height}."),
    )
