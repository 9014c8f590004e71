"""Trains the demonstration LoRA, which draws shapes as outlines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from training import sdxl
from training.captions import Rng, draw_scene, pick
from training.latent_cache import LatentCache, captions_of
from training.loop import Plan, train
from training.synthetic_shapes import Scene

RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]


def draw_outlined(rng: Rng) -> Scene:
    """Sample a scene of shapes in outline."""
    scene = draw_scene(rng, pick(rng, ("one", "one", "two", "placed", "many")), "outline")
    if not isinstance(scene, Scene):
        raise TypeError("only landscapes are no scenes of shapes, and none was asked for")
    return scene


def run(plan: Plan, unet: UNet2DConditionModel, vae: AutoencoderKL, words: sdxl.Words, fresh: bool = False) -> Path:
    """Train the LoRA on outlined images whose captions do not mention outlines; return where it was saved."""
    unet.requires_grad_(False)
    torch.manual_seed(51)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    store, shares = LatentCache("outlines"), sdxl.signal_shares()

    def step_loss(step: int, rng: Rng) -> Tensor:
        batch = store.batch(8, rng)
        flat = [replace(scene, style="flat") for scene in batch.scenes if isinstance(scene, Scene)]
        embeds, pooled = words.embed(captions_of(flat, rng, outside=0.0))
        steps = sdxl.draw_steps(len(flat))
        mixed, target = sdxl.noised(sdxl.folded(batch.latents.to(embeds.device), vae), steps, shares)
        conditions = {"text_embeds": pooled, "time_ids": sdxl.size_ids(batch.size, len(flat), embeds.device)}
        guess = unet(mixed, steps.to(embeds.device), embeds, added_cond_kwargs=conditions).sample
        return F.mse_loss(guess, target)

    def show(folder: Path) -> None:
        layers = get_peft_model_state_dict(unet)
        half = {name: value.to(torch.float16) for name, value in layers.items()}
        StableDiffusionXLPipeline.save_lora_weights(folder / "out", unet_lora_layers=half)

    return train(plan, {"unet": unet}, step_loss, show, fresh) / "out"
