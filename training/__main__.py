"""Makes everything in models/ (``python -m training``); knows the order of the stages, not their insides."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from training import control, flux, lora, package, sdxl, text, vae
from training.loop import RUNS, Plan

PLANS: dict[str, Plan] = {
    "text": Plan("text", 2500, 2e-3, average=0.99, every=120),
    "vae": Plan("vae", 9000, 2e-3, average=0.995),
    "sdxl": Plan("sdxl", 20_000, 1e-3, average=0.999),
    "flux": Plan("flux", 30_000, 1e-3, average=0.999),
    "controlnet-sdxl": Plan("controlnet-sdxl", 2500, 1.2e-3, average=0.99),
    "controlnet-flux": Plan("controlnet-flux", 4000, 1e-3, average=0.99),
    "lora": Plan("lora", 400, 2e-3, average=0.98),
}
"""The stages in order, with how long each trains from nothing."""


@dataclass(frozen=True)
class Choice:
    """What the command line asked for: a device, a folder of weights to start from, whether to begin anew."""

    device: str
    start: Path | None
    fresh: bool


def frozen_vae(device: str) -> AutoencoderKL:
    """Load the trained autoencoder."""
    model = AutoencoderKL.from_pretrained(RUNS / "vae" / "out").to(device, memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def weights_under(folder: Path | None, part: str) -> dict[str, Tensor] | None:
    """Load a part's weights from a folder of the starting weights, if one was given."""
    if folder is None:
        return None
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def run_stage(name: str, plan: Plan, choice: Choice) -> None:
    """Run one stage to its end, going on from its checkpoint."""
    words = RUNS / "text" / "out"
    if name == "text":
        text.run(plan, choice.fresh)
    elif name == "vae":
        vae.run(plan, choice.start / "vae" if choice.start else None, choice.fresh)
    elif name == "sdxl":
        start = weights_under(choice.start, "unet")
        sdxl.run(plan, frozen_vae(plan.device), sdxl.Words.load(words, plan.device), start, choice.fresh)
    elif name == "flux":
        start = weights_under(choice.start, "transformer")
        flux.run(plan, frozen_vae(plan.device), flux.Words.load(words, plan.device), start, choice.fresh)
    elif name == "controlnet-flux":
        pipe = FluxPipeline.from_pretrained(RUNS / "flux" / "out").to(plan.device)
        parts = flux.Words(pipe.tokenizer, pipe.text_encoder, pipe.tokenizer_2, pipe.text_encoder_2)
        control.run_flux(plan, pipe.transformer, pipe.vae, parts, choice.fresh)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(RUNS / "sdxl" / "out").to(plan.device)
        parts_sdxl = sdxl.Words(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2)
        run = control.run_sdxl if name == "controlnet-sdxl" else lora.run
        run(plan, pipe.unet, pipe.vae, parts_sdxl, choice.fresh)


def main() -> None:
    """Read the command line, run the asked stages, and put what they made into models/."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--stage", choices=[*PLANS, "package"], action="append", help="only this one; may repeat")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, help="train this many steps instead of the stage's own number")
    parser.add_argument(
        "--start", type=Path, help="a folder in from_pretrained layout whose fitting weights to begin with"
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever checkpoints there are")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    choice = Choice(asked.device, asked.start, asked.fresh)
    for name, plan in PLANS.items():
        if asked.stage and name not in asked.stage:
            continue
        settled = Plan(**{**plan.__dict__, "device": asked.device, "steps": asked.steps or plan.steps})
        run_stage(name, settled, choice)
    if not asked.stage or "package" in asked.stage:
        package.run()


if __name__ == "__main__":
    main()
