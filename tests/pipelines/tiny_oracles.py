"""Helpers of the oracle tests over tiny pipelines: requests, and what the stock calls draw for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch
from drawing import Pixels
from PIL import Image
from tiny_families import mask, picture
from tiny_parts import LINES, SIDE

from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

# An input image or reference, another one, a wide one, and a mask.
PICTURE, OTHER = ImageArray(np.asarray(picture())), ImageArray(np.asarray(picture(seed=4)))
WIDE = ImageArray(np.asarray(picture())[:32])
MASK = ImageArray(np.asarray(mask()))
WRONG = LINES[1]
IMAGE = {"image": PICTURE, "strength": 0.6}
MASKED = {"image": PICTURE, "mask": MASK, "strength": 0.8}


@dataclass(frozen=True)
class TinyCase:
    """A request's fields, the stock class that draws the same, and further arguments of its call."""

    name: str
    family: str
    stock: str
    request: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def request_for(spec: ModelSpec, **changes: Any) -> DiffusionRequest:
    """A request with a model's defaults, 64 × 64, four steps, and `changes`; its task follows from its images."""
    request = DiffusionRequest(
        task=Task.TEXT_TO_IMAGE,
        model=spec.name,
        revision=spec.revision,
        prompt=LINES[0],
        negative_prompt=None,
        width=SIDE,
        height=SIDE,
        seed=7,
        num_inference_steps=4,
        guidance_scale=spec.default_guidance,
        scheduler=spec.default_scheduler,
    )
    request = replace(request, **changes)
    task = Task.EDIT if request.references else Task.INPAINT if request.mask else Task.IMAGE_TO_IMAGE
    return replace(request, task=task) if request.references or request.image else request


def stock_picture(family: Any, case: TinyCase, request: DiffusionRequest) -> Pixels:
    """What the stock call draws over the family's own components, with a new scheduler."""
    kind = getattr(diffusers, case.stock)
    known = signature(kind).parameters
    parts = {name: part for name, part in family.pipeline.components.items() if name in known}
    scheduler = scheduler_of(family.spec, request.scheduler, request.num_inference_steps)
    parts["scheduler"] = make_scheduler(scheduler, like=family.pipeline.scheduler)
    parts |= {"controlnet": family.controlnet} if "controlnet" in known else {}
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in known else {}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    given = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": torch.Generator().manual_seed(request.seed),
        "max_sequence_length": family.spec.text_tokens,
        "image": _as_pil(request.image or next(iter(request.references), None)),
        "mask_image": _as_pil(request.mask),
        "strength": request.strength,
        **case.arguments,
    }
    taken = signature(pipeline.__call__).parameters
    return np.asarray(pipeline(**{name: value for name, value in given.items() if name in taken}).images[0])


def _as_pil(image: ImageArray | None) -> Any:
    return None if image is None else Image.fromarray(image.pixels)
