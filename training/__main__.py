"""Trains everything in models/ (``python -m training``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline

from training import (
    control,
    flux,
    flux_vae,
    latent_cache,
    lora,
    package,
    sdxl,
    synthetic_shapes,
    text,
    upscaler,
    vae,
)
from training.loop import RUNS, Plan

PLANS: dict[str, Plan] = {
    "clip": Plan("clip", 1600, 2e-3, average=0.99, every=60, cooling=0.35),
    "t5": Plan("t5", 2900, 2e-3, average=0.99, every=60, cooling=0.35, muon=3.0),
    "vae": Plan("vae", 1200, 2e-3, average=0.99, cooling=0.6, every=90, muon=1.0),
    "vae-flux": Plan("vae-flux", 1200, 2e-3, average=0.99, cooling=0.4, every=120, muon=1.0),
    "sdxl": Plan("sdxl", 10_500, 1e-3, cooling=0.45, muon=2.0, reduced=True),
    "flux": Plan("flux", 10_000, 1e-3, cooling=0.45, muon=10.0, reduced=True),
    "controlnet-sdxl": Plan("controlnet-sdxl", 6000, 1e-3, average=0.99, cooling=0.4, muon=3.0, reduced=True),
    "controlnet-flux": Plan("controlnet-flux", 5000, 1e-3, average=0.99, cooling=0.4, muon=3.0, reduced=True),
    "lora": Plan("lora", 400, 2e-3, average=0.98, cooling=0.4),
    "upscaler": Plan("upscaler", 3000, 2e-3, average=0.99, cooling=0.7, every=90),
}
"""What is trained, in order, and how long from nothing."""
STORES: dict[str, int] = {"pictures": 64, "twins": 8, "edges": 16, "outlines": 4}
"""Number of parts of images that are drawn and encoded for the stages, by latent cache."""


def frozen_vae(name: str, device: str) -> AutoencoderKL:
    """Load a trained autoencoder, of the stage ``vae`` or ``vae-flux``."""
    model = AutoencoderKL.from_pretrained(RUNS / name / "out").to(device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def fill(name: str, device: str) -> None:
    """Render and encode the training images of a stage, except those that already exist."""
    if name == "edges":
        latent_cache.fill(frozen_vae("vae", device), name, STORES[name], control.draw_loose, synthetic_shapes.edges)
    elif name == "twins":
        latent_cache.fill(frozen_vae("vae", device), name, STORES[name], sdxl.draw_twinned, twin_of=sdxl.recoloured)
    elif name == "outlines":
        latent_cache.fill(frozen_vae("vae", device), name, STORES[name], lora.draw_outlined)
    else:
        latent_cache.fill(frozen_vae("vae", device), name, STORES[name])


def train_denoiser(plan: Plan, fresh: bool) -> Path:
    """Train a family's denoiser on the cache ``pictures``."""
    fill("pictures", plan.device)
    vae_of_both = frozen_vae("vae-flux", plan.device)
    if plan.name == "sdxl":
        fill("twins", plan.device)
        words = sdxl.Words.load(RUNS / "clip" / "out", plan.device)
        return sdxl.run(plan, vae_of_both, words, fresh)
    words_flux = flux.Words.load(RUNS / "clip" / "out", RUNS / "t5" / "out", plan.device)
    return flux.run(plan, vae_of_both, words_flux, fresh)


def train_beside_sdxl(plan: Plan, fresh: bool) -> Path:
    """Train the ControlNet or the LoRA of the SDXL family, with the UNet frozen."""
    fill("outlines" if plan.name == "lora" else "edges", plan.device)
    pipe = StableDiffusionXLPipeline.from_pretrained(RUNS / "sdxl" / "out").to(plan.device)
    words = sdxl.Words(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2)
    run = lora.run if plan.name == "lora" else control.run_sdxl
    return run(plan, pipe.unet, pipe.vae, words, fresh)


def train_beside_flux(plan: Plan, fresh: bool) -> Path:
    """Train the ControlNet of the Flux family, with the transformer frozen."""
    fill("edges", plan.device)
    pipe = FluxPipeline.from_pretrained(RUNS / "flux" / "out").to(plan.device)
    words = flux.Words(pipe.tokenizer, pipe.text_encoder, pipe.tokenizer_2, pipe.text_encoder_2)
    return control.run_flux(plan, pipe.transformer, pipe.vae, words, fresh)


def train_folded(plan: Plan, fresh: bool) -> Path:
    """Train the Flux family's autoencoder from the SDXL family's."""
    fill("pictures", plan.device)
    return flux_vae.run(plan, frozen_vae("vae", plan.device), fresh)


STAGES: dict[str, Callable[[Plan, bool], Path]] = {
    "clip": text.run,
    "t5": text.run,
    "vae": vae.run,
    "vae-flux": train_folded,
    "sdxl": train_denoiser,
    "flux": train_denoiser,
    "controlnet-sdxl": train_beside_sdxl,
    "controlnet-flux": train_beside_flux,
    "lora": train_beside_sdxl,
    "upscaler": upscaler.run,
}


def main() -> None:
    """Parse the command line, run the requested stages, and write the results to models/."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    packages: dict[str, Callable[[], str]] = {
        **{f"package-{family}": partial(package.run, family) for family in package.PARTS},
        "package-upscaler": package.run_upscaler,
    }
    names = [*PLANS, *STORES, *packages]
    parser.add_argument("--stage", choices=names, action="append", help="only this one; may repeat")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, help="train this many steps instead of the stage's own number")
    parser.add_argument("--fresh", action="store_true", help="start from the beginning, ignoring checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the denoisers (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for name in asked.stage or [*PLANS, *packages]:
        if name in packages:
            sys.stdout.write(f"embedded-{packages[name]()} is the revision of {name.removeprefix('package-')}\n")
        elif name in STORES:
            fill(name, asked.device)
        else:
            plan = replace(PLANS[name], device=asked.device, compiled=asked.compile)
            STAGES[name](replace(plan, steps=asked.steps or plan.steps), asked.fresh)


if __name__ == "__main__":
    main()
