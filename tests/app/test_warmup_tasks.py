"""Warm-up draws what a model draws: from a grey image where it does not draw from text, alone where it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeDenoiser

from stable_diffusion_server.app.warmup import warm_up
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.types import Task


class CountingDenoiser(FakeDenoiser):
    """Remembers how many requests shared a step."""

    largest = 0

    def step(self, states: Sequence[Any]) -> None:
        self.largest = max(self.largest, len(states))
        super().step(states)


@pytest.mark.parametrize(
    ("tasks", "drawn", "given"),
    [
        ((Task.TEXT_TO_IMAGE, Task.EDIT), Task.TEXT_TO_IMAGE, ()),
        ((Task.INPAINT,), Task.INPAINT, ("image", "mask")),
        ((Task.IMAGE_TO_IMAGE,), Task.IMAGE_TO_IMAGE, ("image",)),
        ((Task.EDIT,), Task.EDIT, ("references",)),
    ],
)
def test_a_model_is_warmed_up_with_a_task_of_its_own(tasks: Any, drawn: Task, given: tuple[str, ...]) -> None:
    """With the images that the task needs, in the size of the canvas."""
    models, spec = FakeDenoiser(), replace(MODELS["flux"], tasks=tasks)
    warm_up(models, {"flux": spec}, [(128, 128)], pairs=False)
    (job,) = models.prepared
    assert job.task is drawn
    assert [name for name in ("image", "mask", "references") if getattr(job, name)] == list(given)
    images = [*job.references, *(image for image in (job.image, job.mask) if image is not None)]
    assert all(image.pixels.shape[:2] == (job.height, job.width) for image in images)


@pytest.mark.parametrize(("batches", "together"), [(True, 2), (False, 1)])
def test_a_model_that_shares_no_pass_is_warmed_up_alone(batches: bool, together: int) -> None:
    """Although pairs are asked for."""
    models = CountingDenoiser()
    warm_up(models, {"flux": replace(MODELS["flux"], batches=batches)}, [(128, 128)], pairs=True)
    assert models.largest == together
