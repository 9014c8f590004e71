"""Tiny pipelines as the stock family draws them, and the stock call of the same request."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import tiny_families
import torch
from drawing import Pixels
from PIL import Image
from tiny_drawing import tiny_request
from tiny_parts import SIDE

from stable_diffusion_server.pipelines.families.stock import Stock
from stable_diffusion_server.pipelines.stock_rows import STOCK_ROWS
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

# Changes of the rows: tiny tokenizers and encoders take fewer tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "sd3": {"text_tokens": 64, "tasks": (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT)},
    "chroma": {"text_tokens": 64},
    "flux-kontext": {
        "text_tokens": 64,
        "takes_negative_prompt": False,
        "tasks": (Task.EDIT,),
        "max_references": 1,
        "default_guidance": 2.5,
    },
    "flux-dev": {"text_tokens": 64, "takes_negative_prompt": False},
    "flux2-klein": {"text_tokens": 64, "takes_negative_prompt": False},
    "sd15": {"tasks": (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT), "denoiser_part": "unet"},
    "z-image": {"tasks": (Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT)},
}


def stock_family(name: str, pipeline: Any = None) -> Stock:
    """The stock family over a tiny pipeline in fp32; some of these classes have families of their own."""
    pipeline = pipeline or tiny_families.build(name)
    kind = type(pipeline).__name__
    row = STOCK_ROWS.get(kind) or replace(STOCK_ROWS["AuraFlowPipeline"], pipeline_class=kind)
    return Stock(pipeline, replace(row, name=name, native_pixels=4 * SIDE**2, min_side=SIDE, **CHANGES.get(name, {})))


def picture(seed: int = 3, side: int = SIDE) -> ImageArray:
    """Blocks in random colours."""
    return ImageArray(np.asarray(tiny_families.picture(side, seed)))


def middle() -> ImageArray:
    """A mask of the middle."""
    return ImageArray(np.asarray(tiny_families.mask()))


def request_of(family: Stock, task: Task = Task.TEXT_TO_IMAGE, **changes: Any) -> DiffusionRequest:
    """A request of a task, with the images it takes."""
    images: dict[str, Any] = {}
    if task is Task.EDIT:
        images = {"references": (picture(),)}
    elif task is not Task.TEXT_TO_IMAGE:
        images = {"image": picture(), "strength": 0.9}
    if task is Task.INPAINT:
        images["mask"] = middle()
    return tiny_request(family.spec, task, **{**images, **changes})


def direct_call(pipeline: Any, request: DiffusionRequest, **arguments: Any) -> Pixels:
    """The stock call of a request, whole; `arguments` are those of its class beside prompt, size, steps and images."""
    given: dict[str, Any] = {"prompt": request.prompt, "num_inference_steps": request.num_inference_steps}
    if "height" in signature(type(pipeline).__call__).parameters:
        given |= {"height": request.height, "width": request.width}
    if request.image is not None:
        given |= {"image": Image.fromarray(request.image.pixels), "strength": request.strength}
    if request.mask is not None:
        given["mask_image"] = Image.fromarray(request.mask.pixels)
    if request.references:
        given["image"] = [Image.fromarray(image.pixels) for image in request.references]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(request.seed)
    return np.asarray(pipeline(**given, **arguments, generator=generator)[0][0])
