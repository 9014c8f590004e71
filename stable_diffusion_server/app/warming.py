"""Draws with every model before the server is ready, so that no caller waits for a compiler. Stores nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

import structlog

from stable_diffusion_server.engine import Denoiser
from stable_diffusion_server.image_processing import plan_canvas
from stable_diffusion_server.orders import Job, Task
from stable_diffusion_server.pipelines.catalog import ModelFacts

_log = structlog.get_logger(__name__)


def warm_up(models: Denoiser[Any, Any], facts: Mapping[str, ModelFacts], sizes: Iterable[tuple[int, int]]) -> None:
    """Draw two pictures of each size (width, height) with each model, one that joins the other after its first step.

    A compiler takes a batch of one for a program of its own, and the first larger one for any other. Raises what
    drawing raises: what fails now would fail every caller.
    """
    for name, size in ((name, size) for name in facts for size in sizes):
        started = perf_counter()
        job = _job_of(facts[name], *size)
        first, second = models.prepare(job), models.prepare(job)
        models.step([first])
        while not first.done:
            models.step([first, second])
        while not second.done:
            models.step([second])
        models.finish(first)
        _log.info("warmed up", model=name, width=size[0], height=size[1], seconds=round(perf_counter() - started, 1))


def _job_of(facts: ModelFacts, width: int, height: int) -> Job:
    canvas = plan_canvas(width, height, facts.native_pixels, facts.floor)
    steps, guidance = max(2, facts.default_steps), facts.default_guidance
    words = (facts.name, facts.revision, "", "" if facts.takes_negative_prompt else None)
    drawn = (0, steps, guidance, facts.default_scheduler)
    return Job(Task.TEXT_TO_IMAGE, *words, canvas.width, canvas.height, *drawn)
