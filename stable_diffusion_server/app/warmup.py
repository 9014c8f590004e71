"""Warm-up: generates with every model before the server is ready, so that few callers wait for a compiler."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import structlog

from stable_diffusion_server.engine import Denoiser
from stable_diffusion_server.errors import DeviceLost
from stable_diffusion_server.imaging import Canvas, plan_canvas
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

_log = structlog.get_logger(__name__)

_NO_GUIDANCE = 1.0
_GREY, _REPAINTED = 128, 255


def warm_up(
    models: Denoiser[Any, Any],
    specs: Mapping[str, ModelSpec],
    sizes: Collection[tuple[int, int]],
    *,
    pairs: bool,
) -> None:
    """Generate an image of each size (width, height; pixels) with each model, with default guidance and without.

    With `pairs` a second request joins after the first step: compilers make one program for batch size 1, and one for
    all larger sizes; models that share no forward passes take none. Failures are only logged, because the engine may
    still succeed: it frees memory and retries. Skips models with offloaded weights, which are not compiled. Raises
    `DeviceLost`.
    """
    if not models.resident:
        return
    for job in dict.fromkeys(_requests(specs, sizes)):
        started = perf_counter()
        try:
            _generate(models, job, pairs=pairs and specs[job.model].batches)
        except DeviceLost:
            raise
        except Exception as error:
            models.release_memory()
            _log.warning("not warmed up", model=job.model, width=job.width, height=job.height, exc_info=error)
        else:
            seconds = round(perf_counter() - started, 1)
            _log.info("warmed up", model=job.model, width=job.width, height=job.height, seconds=seconds)


def _generate(models: Denoiser[Any, Any], job: DiffusionRequest, *, pairs: bool) -> None:
    first = models.prepare(job)
    models.step([first])
    states = [first, models.prepare(job)] if pairs else [first]
    while not first.done:
        models.step(states)
    models.finish(first)


def _requests(specs: Mapping[str, ModelSpec], sizes: Collection[tuple[int, int]]) -> Iterator[DiffusionRequest]:
    for model in specs.values():
        default = model.default_guidance
        for guidance in (default, _NO_GUIDANCE) if default > _NO_GUIDANCE else (default,):
            for width, height in sizes:
                canvas = plan_canvas(width, height, model.native_pixels, model.min_side)
                task = Task.TEXT_TO_IMAGE if Task.TEXT_TO_IMAGE in model.tasks else model.tasks[0]
                yield DiffusionRequest(
                    task=task,
                    model=model.name,
                    revision=model.revision,
                    prompt="",
                    negative_prompt="" if model.takes_negative_prompt else None,
                    width=canvas.width,
                    height=canvas.height,
                    seed=0,
                    num_inference_steps=max(2, model.default_steps),
                    guidance_scale=guidance,
                    scheduler=model.default_scheduler,
                    **_images_for(task, canvas),
                )


def _images_for(task: Task, canvas: Canvas) -> dict[str, Any]:
    """Return the grey images that a task starts from, and a mask over everything."""
    if task is Task.TEXT_TO_IMAGE:
        return {}
    image = ImageArray(np.full((canvas.height, canvas.width, 3), _GREY, np.uint8))
    if task is Task.EDIT:
        return {"references": (image,)}
    mask = {"mask": ImageArray(np.full((canvas.height, canvas.width), _REPAINTED, np.uint8))}
    return {"image": image, **(mask if task is Task.INPAINT else {})}
