"""A folder's own scheduler is its default, and draws what the stock pipeline draws with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoint_stand_ins import sdxl_pipeline
from drawing import draw, job_for, largest_difference, scene
from PIL import Image

from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.owned_models import find_owned_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # diffusers' KDPM2 schedulers hand tensors to numpy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "Euler Karras": ("EulerDiscreteScheduler", KARRAS),
    "KDPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DPM++ SDE single": ("DPMSolverSinglestepScheduler", {}),
}
SPEC = replace(REAL_MODELS["sdxl"][1], schedulers=("own",), control_folder=None)


@pytest.fixture(scope="module")
def small() -> Any:
    """A small SDXL."""
    return sdxl_pipeline()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", SCHEDULERS)
def test_the_own_scheduler_draws_as_stock(case: str, small: Any) -> None:
    """Solvers of one and of two evaluations a step, ancestral and distilled ones."""
    name, options = SCHEDULERS[case]
    scheduler = getattr(diffusers, name).from_config(small.scheduler.config, **options)
    own = diffusers.StableDiffusionXLPipeline(**{**small.components, "scheduler": scheduler}, add_watermarker=False)
    own.set_progress_bar_config(disable=True)
    job = job_for("sdxl", guidance_scale=3.0, scheduler="own")
    drawn = draw(Sdxl(own, SPEC), job)
    stock = own(
        prompt=job.prompt,
        num_inference_steps=job.num_inference_steps,
        height=128,
        width=128,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(job.seed),
    )
    assert largest_difference(drawn, np.asarray(stock.images[0])) <= 2


@pytest.mark.usefixtures("one_thread")
def test_means_and_deviations_of_latents_are_used(small: Any) -> None:
    """As Playground v2.5 has them, with its own EDM scheduler: from text and from an image."""
    parts = dict(small.components)
    parts["scheduler"] = diffusers.EDMDPMSolverMultistepScheduler()
    own = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    own.vae.register_to_config(latents_mean=[-1.6, 1.1, 3.3, -0.1], latents_std=[8.4, 5.0, 5.9, 5.2])
    try:
        job = job_for("sdxl", guidance_scale=3.0, scheduler="own")
        given = {"prompt": job.prompt, "num_inference_steps": job.num_inference_steps, "guidance_scale": 3.0}
        own.set_progress_bar_config(disable=True)
        stock = own(**given, height=128, width=128, generator=torch.Generator().manual_seed(job.seed))
        assert largest_difference(draw(Sdxl(own, SPEC), job), np.asarray(stock.images[0])) <= 2
        other = diffusers.StableDiffusionXLImg2ImgPipeline(**own.components, add_watermarker=False)
        other.set_progress_bar_config(disable=True)
        job = job_for("sdxl", guidance_scale=3.0, scheduler="own", image=scene(), strength=0.5)
        picture = Image.fromarray(scene().pixels)
        stock = other(**given, image=picture, strength=0.5, generator=torch.Generator().manual_seed(job.seed))
        assert largest_difference(draw(Sdxl(own, SPEC), job), np.asarray(stock.images[0])) <= 2
    finally:
        own.vae.register_to_config(latents_mean=None, latents_std=None)


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_a"),
        ("UniPCMultistepScheduler", "unipc"),
        ("LCMScheduler", "own"),
        ("EDMEulerScheduler", "own"),
    ],
)
def test_a_folder_draws_by_its_own_scheduler(name: str, default: str, small: Any, tmp_path: Path) -> None:
    """Unless one of ours is of the same arithmetic; EDM's numbers suit no other."""
    folder = tmp_path / "merge"
    small.save_pretrained(folder)
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "_class_name": name}))
    spec = find_owned_models(tmp_path, (tmp_path,)).specs["merge"]
    assert spec.default_scheduler == default
    assert (spec.schedulers == ("own",)) == name.startswith("EDM")


def test_a_sharded_variant_is_found(small: Any, tmp_path: Path) -> None:
    """As `save_pretrained(variant="fp16")` writes it: the first shard alone does not tell what it belongs to."""
    small.save_pretrained(tmp_path / "merge", variant="fp16", max_shard_size="2MB")
    found = find_owned_models(tmp_path, (tmp_path,))
    assert (not found.refused, [*found.specs]) == (True, ["merge"])
