"""Draws with every model before the server is ready, so that few callers wait for a compiler. Stores nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from time import perf_counter
from typing import Any

import structlog

from stable_diffusion_server.engine import Denoiser, DenoiserCapabilities
from stable_diffusion_server.errors import DeviceLost
from stable_diffusion_server.imaging import plan_canvas
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import DiffusionRequest, Task

_log = structlog.get_logger(__name__)

_NO_GUIDANCE = 1.0


def warm_up(
    models: Denoiser[Any, Any],
    abilities: DenoiserCapabilities,
    facts: Mapping[str, ModelSpec],
    sizes: Collection[tuple[int, int]],
    *,
    together: bool,
) -> None:
    """Draw on the canvas of each size (width, height) with each model, with its usual guidance and without.

    With `together` a second job joins the first after a step: a compiler takes a batch of one for a program of its own,
    and the first larger one for any other. What fails is told in the log and nothing else, since the engine can do what
    drawing alone cannot: it frees memory and tries again. Nothing is done where weights travel, which are not compiled.
    Raises `DeviceLost`.
    """
    for job in dict.fromkeys(_jobs(facts, sizes)) if abilities.resident else ():
        started = perf_counter()
        try:
            _draw(models, job, together=together)
        except DeviceLost:
            raise
        except Exception as error:
            abilities.release_memory()
            _log.warning("not warmed up", model=job.model, width=job.width, height=job.height, exc_info=error)
        else:
            seconds = round(perf_counter() - started, 1)
            _log.info("warmed up", model=job.model, width=job.width, height=job.height, seconds=seconds)


def _draw(models: Denoiser[Any, Any], job: DiffusionRequest, *, together: bool) -> None:
    first = models.prepare(job)
    models.step([first])
    states = [first, models.prepare(job)] if together else [first]
    while not first.done:
        models.step(states)
    models.finish(first)


def _jobs(facts: Mapping[str, ModelSpec], sizes: Collection[tuple[int, int]]) -> Iterator[DiffusionRequest]:
    for model in facts.values():
        usual = model.default_guidance
        for guidance in (usual, _NO_GUIDANCE) if usual > _NO_GUIDANCE else (usual,):
            for width, height in sizes:
                canvas = plan_canvas(width, height, model.native_pixels, model.min_side)
                words = (model.name, model.revision, "", "" if model.takes_negative_prompt else None)
                drawn = (0, max(2, model.default_steps), guidance, model.default_scheduler)
                yield DiffusionRequest(Task.TEXT_TO_IMAGE, *words, canvas.width, canvas.height, *drawn)
