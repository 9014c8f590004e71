"""Rows and requests for tiny pipelines, and the stock call of the same request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from drawing import PROMPT, Pixels
from tiny_parts import SIDE

from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import FileIdentity, Kind
from stable_diffusion_server.pipelines.library.identity import ModelTask
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, Task


def tiny_row(family: str, variant: str = "", task: ModelTask = ModelTask.NORMAL, **changes: Any) -> ModelSpec:
    """The row of a family, for images of the tiny pipelines' size."""
    row = family_row(FileIdentity(Kind.PIPELINE, (family,), variant=variant, task=task))
    assert row is not None, f"{family} {variant} has no row"
    return replace(row, name=family, native_pixels=4 * SIDE * SIDE, min_side=SIDE, **changes)


def tiny_request(spec: ModelSpec, task: Task = Task.TEXT_TO_IMAGE, **changes: Any) -> DiffusionRequest:
    """A request of four steps with the defaults of a row."""
    request = DiffusionRequest(
        task=task,
        model=spec.name,
        revision=spec.revision,
        prompt=PROMPT,
        negative_prompt=None,
        width=SIDE,
        height=SIDE,
        seed=7,
        num_inference_steps=4,
        guidance_scale=spec.default_guidance,
        scheduler=spec.default_scheduler,
    )
    return replace(request, **changes)


def stock_call(pipeline: Any, request: DiffusionRequest, **arguments: Any) -> Pixels:
    """What the stock call draws for a request; `arguments` are those of its class."""
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator().manual_seed(request.seed),
    }
    pipeline.set_progress_bar_config(disable=True)
    pixels: Pixels = np.asarray(pipeline(**{**given, **arguments}).images[0])
    return pixels
