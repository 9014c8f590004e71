"""Helpers of the pipeline tests: jobs, input images, generation alone and in a batch, image comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

MODELS_DIR = Path(__file__).parents[2] / "models"
SIDE = 128  # enough for every code path, and quick
PROMPT = "a red circle on a blue background"

Pixels = NDArray[np.uint8]


def job_for(model: str, **changes: Any) -> DiffusionRequest:
    """A text-to-image job with a model's defaults and `changes`; its task follows from its images."""
    facts = MODELS[model]
    job = DiffusionRequest(
        task=Task.TEXT_TO_IMAGE,
        model=model,
        revision=facts.revision,
        prompt=PROMPT,
        negative_prompt=None,
        width=SIDE,
        height=SIDE,
        seed=7,
        num_inference_steps=4,
        guidance_scale=facts.default_guidance,
        scheduler=facts.default_scheduler,
    )
    job = replace(job, **changes)
    if job.mask is not None:
        return replace(job, task=Task.INPAINT)
    return replace(job, task=Task.IMAGE_TO_IMAGE) if job.image is not None else job


def disc(width: int = SIDE, height: int = SIDE) -> NDArray[np.bool_]:
    """Mask of a disc in the middle, height × width."""
    y, x = np.mgrid[:height, :width]
    return np.asarray((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) * 0.3) ** 2)


def scene(width: int = SIDE, height: int = SIDE) -> ImageArray:
    """A green disc on yellow."""
    pixels = np.where(disc(width, height)[..., None], (40, 160, 60), (240, 220, 60))
    return ImageArray(pixels.astype(np.uint8))


def disc_mask(width: int = SIDE, height: int = SIDE) -> ImageArray:
    """255 on the disc, which is to be repainted."""
    return ImageArray((disc(width, height) * 255).astype(np.uint8))


def outline(width: int = SIDE, height: int = SIDE) -> ImageArray:
    """White edges of the disc on black, one pixel wide, like canny's."""
    inside = disc(width, height)
    edge = inside ^ (np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    return ImageArray(((edge & inside) * 255).astype(np.uint8))


def draw(family: Any, job: DiffusionRequest) -> Pixels:
    """The job's image, generated alone."""
    return draw_together(family, [job])[0]


def draw_together(family: Any, jobs: list[DiffusionRequest]) -> list[Pixels]:
    """The jobs' images, generated in one batch that each leaves when it is done."""
    states = [family.prepare(job) for job in jobs]
    while waiting := [state for state in states if not state.done]:
        family.step(waiting)
    return [family.finish(state).pixels for state in states]


def largest_difference(a: Pixels, b: Pixels) -> int:
    """Largest difference of two images in any channel, of 255."""
    return int(np.abs(a.astype(int) - b).max())


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two images in dB; infinite when they are equal."""
    error = float(np.mean((a.astype(float) - b) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
