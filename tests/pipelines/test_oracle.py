"""The stock diffusers pipelines' own calls are the oracle: same components, seed and scheduler give the same image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drawing import SIDE, Pixels, disc_mask, draw, job_for, largest_difference, outline, scene
from PIL import Image

from stable_diffusion_server.pipelines.catalog import refine_steps_skipped, scheduler_of
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler
from stable_diffusion_server.types import DiffusionRequest, ImageArray

# The stock calls warn about their own attributes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

IMAGE = {"image": scene(), "strength": 0.6}
MASKED = {"image": scene(), "mask": disc_mask(), "strength": 0.8}
EDGES = {"control": outline(), "control_scale": 0.7}


@dataclass(frozen=True)
class Case:
    """A job's fields, and the matching stock pipelines: the second one takes the first one's latents."""

    name: str
    family: str
    stock: str
    job: dict[str, Any] = field(default_factory=dict)
    refiner: str | None = None


CASES = [
    Case("text", "sdxl", "StableDiffusionXLPipeline"),
    Case("text, no guidance", "sdxl", "StableDiffusionXLPipeline", {"guidance_scale": 1.0}),
    Case("text, negative prompt", "sdxl", "StableDiffusionXLPipeline", {"negative_prompt": "green"}),
    Case("text, empty negative prompt", "sdxl", "StableDiffusionXLPipeline", {"negative_prompt": ""}),
    Case("text, second prompt", "sdxl", "StableDiffusionXLPipeline", {"prompt_2": "a green star"}),
    Case("text, ancestral", "sdxl", "StableDiffusionXLPipeline", {"scheduler": "euler_a"}),
    Case("text, ddim", "sdxl", "StableDiffusionXLPipeline", {"scheduler": "ddim"}),
    Case("text, unipc", "sdxl", "StableDiffusionXLPipeline", {"scheduler": "unipc"}),
    Case("text, not square", "sdxl", "StableDiffusionXLPipeline", {"width": 192}),
    Case("text + refine", "sdxl-4", "StableDiffusionXLPipeline", {"refine": True}, "StableDiffusionXLImg2ImgPipeline"),
    Case("image", "sdxl", "StableDiffusionXLImg2ImgPipeline", IMAGE),
    Case("image, whole strength", "sdxl", "StableDiffusionXLImg2ImgPipeline", {**IMAGE, "strength": 1.0}),
    Case("image, ancestral", "sdxl", "StableDiffusionXLImg2ImgPipeline", {**IMAGE, "scheduler": "euler_a"}),
    Case("image, ddim", "sdxl", "StableDiffusionXLImg2ImgPipeline", {**IMAGE, "scheduler": "ddim"}),
    Case("image, unipc", "sdxl", "StableDiffusionXLImg2ImgPipeline", {**IMAGE, "scheduler": "unipc"}),
    Case(
        "image + refine",
        "sdxl-4",
        "StableDiffusionXLImg2ImgPipeline",
        {**IMAGE, "refine": True, "num_inference_steps": 7},
        "StableDiffusionXLImg2ImgPipeline",
    ),
    Case("inpaint", "sdxl-4", "StableDiffusionXLInpaintPipeline", MASKED),
    Case("inpaint, whole strength", "sdxl-4", "StableDiffusionXLInpaintPipeline", {**MASKED, "strength": 1.0}),
    Case("inpaint, ancestral", "sdxl-4", "StableDiffusionXLInpaintPipeline", {**MASKED, "scheduler": "euler_a"}),
    Case("inpaint, ddim", "sdxl-4", "StableDiffusionXLInpaintPipeline", {**MASKED, "scheduler": "ddim"}),
    Case("inpaint, unipc", "sdxl-4", "StableDiffusionXLInpaintPipeline", {**MASKED, "scheduler": "unipc"}),
    Case(
        "inpaint + refine",
        "sdxl-4",
        "StableDiffusionXLInpaintPipeline",
        {**MASKED, "refine": True},
        "StableDiffusionXLInpaintPipeline",
    ),
    Case(
        "inpaint + refine, 3 steps",
        "sdxl-4",
        "StableDiffusionXLInpaintPipeline",
        {**MASKED, "refine": True, "num_inference_steps": 3},
        "StableDiffusionXLInpaintPipeline",
    ),
    Case("edges", "sdxl", "StableDiffusionXLControlNetPipeline", EDGES),
    Case("edges, no guidance", "sdxl", "StableDiffusionXLControlNetPipeline", {**EDGES, "guidance_scale": 1.0}),
    Case("image + edges", "sdxl", "StableDiffusionXLControlNetImg2ImgPipeline", {**IMAGE, **EDGES}),
    Case("text", "flux", "FluxPipeline"),
    Case("text, not square", "flux", "FluxPipeline", {"width": 192}),
    Case("text + refine", "flux", "FluxPipeline", {"refine": True}, "FluxImg2ImgPipeline"),
    Case("image", "flux", "FluxImg2ImgPipeline", IMAGE),
    Case("image, whole strength", "flux", "FluxImg2ImgPipeline", {**IMAGE, "strength": 1.0}),
    Case("inpaint", "flux", "FluxInpaintPipeline", MASKED),
    Case("inpaint, whole strength", "flux", "FluxInpaintPipeline", {**MASKED, "strength": 1.0}),
    Case("inpaint + refine", "flux-16", "FluxInpaintPipeline", {**MASKED, "refine": True}, "FluxInpaintPipeline"),
    Case("edges", "flux", "FluxControlNetPipeline", EDGES),
    Case("image + edges", "flux", "FluxControlNetImg2ImgPipeline", {**IMAGE, **EDGES}),
]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Table rows to quote, printed at the end (`pytest -s`)."""
    rows: list[str] = []
    yield rows
    print("\n| family | task | largest difference of 255 | mean |\n| --- | --- | --- | --- |")  # noqa: T201  # the table
    print("\n".join(rows))  # noqa: T201  # prints the table


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}: {case.name}")
def test_a_job_is_drawn_as_the_stock_pipeline_draws_it(case: Case, families: dict[str, Any], table: list[str]) -> None:
    """Prepare, step and finish equal the matching stock call, to within 2 of 255 in any pixel."""
    family = families[case.family]
    job = job_for(case.family.partition("-")[0], **{"height": SIDE, **case.job})
    ours, stock = draw(family, job), draw_by_stock(family, case, job)
    mean = np.abs(ours.astype(int) - stock).mean()
    table.append(f"| {case.family} | {case.name} | {largest_difference(ours, stock)} | {mean:.4f} |")
    assert stock.std() > 5, "a flat picture would prove nothing"
    assert largest_difference(ours, stock) <= 2


def draw_by_stock(family: Any, case: Case, job: DiffusionRequest) -> Pixels:
    """The job by one or two stock calls over the same components."""
    arguments = stock_arguments(family, job)
    first = stock_pipeline(family, case.stock, job)
    given = pictures_for(case.stock, job, _as_pil(job.image))
    if case.refiner is None:
        return _pixels(first(**arguments, **given, generator=_seeded(job.seed)))
    latents = first(**arguments, **given, generator=_seeded(job.seed), output_type="latent").images
    if family.spec.name == "flux":
        latents = first._unpack_latents(latents, job.height, job.width, first.vae_scale_factor)
    steps = job.num_inference_steps
    strength = (steps - refine_steps_skipped(family.spec, steps)) / steps
    given = {**pictures_for(case.refiner, job, latents), "strength": strength}
    if case.refiner == "FluxInpaintPipeline":
        given["masked_image_latents"] = torch.zeros_like(latents)  # only used by UNets with a mask channel
    return _pixels(stock_pipeline(family, case.refiner, job)(**arguments, **given, generator=_seeded(job.seed + 1)))


def stock_pipeline(family: Any, name: str, job: DiffusionRequest) -> Any:
    """A stock pipeline over the family's own components, with a new scheduler of the job's kind."""
    kind = getattr(diffusers, name)
    parts = {part: module for part, module in family.pipeline.components.items() if part in signature(kind).parameters}
    facts = scheduler_of(family.spec, job.scheduler, job.num_inference_steps)
    parts["scheduler"] = make_scheduler(facts, like=family.pipeline.scheduler)
    if "ControlNet" in name:
        parts["controlnet"] = family.controlnet
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_arguments(family: Any, job: DiffusionRequest) -> dict[str, Any]:
    """The arguments common to every stock call of the family."""
    arguments: dict[str, Any] = {
        "prompt": job.prompt,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
    }
    if family.spec.name == "flux":
        return {**arguments, "max_sequence_length": family.spec.text_tokens}
    return {**arguments, "negative_prompt": job.negative_prompt, "prompt_2": job.prompt_2}


def pictures_for(name: str, job: DiffusionRequest, image: Any) -> dict[str, Any]:
    """Image arguments of a stock call, under that pipeline's parameter names."""
    size = {"height": job.height, "width": job.width}
    starts = "Img2Img" in name or "Inpaint" in name
    given: dict[str, Any] = {"image": image, "strength": job.strength} if starts else {}
    if "Inpaint" in name:
        given["mask_image"] = _as_pil(job.mask)
    if "ControlNet" in name:
        hint = "image" if name == "StableDiffusionXLControlNetPipeline" else "control_image"
        given |= {hint: _as_pil(job.control).convert("RGB"), "controlnet_conditioning_scale": job.control_scale}
    takes_no_size = name == "StableDiffusionXLImg2ImgPipeline"
    return given if takes_no_size else {**given, **size}


def _as_pil(picture: ImageArray | None) -> Any:
    return None if picture is None else Image.fromarray(picture.pixels)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(output: Any) -> Pixels:
    return np.asarray(output.images[0])


def test_the_largest_difference_sees_a_single_pixel() -> None:
    """The measure detects a difference even between images that are equal nearly everywhere."""
    picture = scene().pixels
    other = picture.copy()
    other[3, 5, 1] += 9
    assert largest_difference(picture, other) == 9
