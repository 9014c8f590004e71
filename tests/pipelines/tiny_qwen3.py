"""Tiny models of FLUX.2 klein and Z-Image, and the stock calls of their requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import tiny_families
from drawing import Pixels
from PIL import Image
from tiny_drawing import stock_call, tiny_request, tiny_row

from stable_diffusion_server.pipelines.families.flux2_klein import Flux2Klein
from stable_diffusion_server.pipelines.families.z_image import ZImage
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

PICTURE = ImageArray(np.asarray(tiny_families.picture()))
MASK = ImageArray(np.asarray(tiny_families.mask()))
# References of unlike sizes.
REFERENCES = tuple(
    ImageArray(np.asarray(tiny_families.picture(side, seed).resize((side + wider, side))))
    for side, seed, wider in ((64, 3, 0), (96, 4, 0), (64, 5, 48))
)


def klein(variant: str = "klein") -> Flux2Klein:
    """FLUX.2 klein; `klein-base` is not distilled."""
    name = {"klein": "flux2-klein", "klein-base": "flux2-klein-base"}[variant]
    return Flux2Klein(tiny_families.build(name), tiny_row("flux2", variant))


def z_image(variant: str = "turbo") -> ZImage:
    """Z-Image-Turbo; `base` takes guidance."""
    name = {"turbo": "z-image-turbo", "base": "z-image"}[variant]
    return ZImage(tiny_families.build(name), tiny_row("z-image", variant))


def order(family: Any, **changes: Any) -> DiffusionRequest:
    """A request with the defaults of a family's row; its task follows from its images."""
    task = Task.EDIT if changes.get("references") else Task.TEXT_TO_IMAGE
    task = Task.IMAGE_TO_IMAGE if changes.get("image") else task
    return tiny_request(family.spec, Task.INPAINT if changes.get("mask") else task, **changes)


def by_stock(family: Any, request: DiffusionRequest, **changes: Any) -> Pixels:
    """What the stock pipeline of the request's task draws over the same components."""
    request = replace(request, **changes)
    pipe, name = family.pipeline, family.spec.name
    given: dict[str, Any] = {"guidance_scale": request.guidance_scale}
    references = [Image.fromarray(image.pixels) for image in request.references]
    start = None if request.image is None else Image.fromarray(request.image.pixels)
    if name == "z-image":
        given |= {"negative_prompt": request.negative_prompt}
    if start is None:
        given |= {"image": references} if references else {}
    else:
        given |= {"image": start, "strength": request.strength}
        pipe = _starting(pipe, name, masked=request.mask is not None)
        if request.mask is not None or name == "flux2":
            covered = np.full(np.asarray(start).shape[:2], 255, np.uint8)
            given |= {"mask_image": Image.fromarray(request.mask.pixels if request.mask else covered)}
        given |= {"image_reference": references} if references else {}
    return stock_call(pipe, request, **given)


def _starting(pipe: Any, name: str, *, masked: bool) -> Any:
    """The stock pipeline that starts from an image. klein has none without a mask."""
    if name == "flux2":
        distilled = pipe.config.is_distilled
        return diffusers.Flux2KleinInpaintPipeline(**pipe.components, is_distilled=distilled)
    return (diffusers.ZImageInpaintPipeline if masked else diffusers.ZImageImg2ImgPipeline)(**pipe.components)


def passes(family: Any, states: Sequence[Any]) -> list[int]:
    """Draw states to their end in one batch; returns the requests in each call of the denoiser."""
    counted: list[int] = []
    waiting: list[Any] = []
    handle = family.pipeline.transformer.register_forward_pre_hook(lambda *_: counted.append(len(waiting)))
    try:
        while waiting := [state for state in states if not state.done]:
            family.step(waiting)
    finally:
        handle.remove()
    return counted
