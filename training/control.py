"""Trains both families' Canny ControlNets beside a frozen denoiser; knows nothing of how that was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from training import flux, sdxl
from training.grammar import Rng, draw_scene
from training.landscape import Landscape
from training.loop import Plan, train
from training.pool import Pool, captions_of
from training.vae import to_tensor
from training.world import Scene, edges


def draw_loose(rng: Rng) -> Scene | Landscape:
    """Draw a scene, mostly of the kind whose caption does not give the geometry away."""
    return draw_scene(rng, "free" if rng.random() < 0.65 else None)


def stir(layers: list[nn.Module], spread: float) -> None:
    """Give layers small random weights instead of zeros, from which little was learned in minutes."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=spread)


def build_sdxl(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet that begins as a copy of the UNet's encoder."""
    torch.manual_seed(41)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32, 64, 64))
    nn.init.kaiming_normal_(net.controlnet_cond_embedding.conv_out.weight, nonlinearity="linear")
    stir([*net.controlnet_down_blocks, net.controlnet_mid_block], 0.02)
    return net


def build_flux(transformer: FluxTransformer2DModel) -> FluxControlNetModel:
    """Return a ControlNet of 2 double blocks that begins as a copy of the transformer's."""
    torch.manual_seed(42)
    net = FluxControlNetModel.from_transformer(
        transformer, num_layers=2, num_single_layers=0, attention_head_dim=32, num_attention_heads=4
    )
    stir([net.controlnet_x_embedder], 0.05)
    stir(list(net.controlnet_blocks), 0.02)
    return net


def run_sdxl(
    plan: Plan, unet: UNet2DConditionModel, vae: AutoencoderKL, words: sdxl.Words, fresh: bool = False
) -> Path:
    """Train the SDXL family's ControlNet and save it as ``out``; return that path."""
    for module in (unet, words.first, words.second):
        module.requires_grad_(False)
    net = build_sdxl(unet).to(plan.device, memory_format=torch.channels_last)
    pool = Pool(vae, 1600, np.random.default_rng((plan.seed, 79)), draw_loose, edges)
    shares, scale = sdxl.signal_shares(), vae.config.scaling_factor

    def step_loss(step: int, rng: Rng) -> Tensor:
        size, latents, scenes, hints = pool.batch(12, rng)
        count = len(scenes)
        embeds, pooled = words.embed(captions_of(scenes, rng))
        kept = (torch.rand(count, device=embeds.device) > 0.3).float()
        steps = torch.randint(300, 1000, (count,))
        mixed, target = sdxl.noised(latents * scale, steps, shares)
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        common = {
            "encoder_hidden_states": embeds * kept[:, None, None],
            "added_cond_kwargs": {
                "text_embeds": pooled * kept[:, None],
                "time_ids": sdxl.size_ids(size, count, embeds.device),
            },
        }
        hint = ((to_tensor(hints) + 1) / 2).to(embeds.device)
        steps = steps.to(embeds.device)
        down, middle = net(mixed, steps, controlnet_cond=hint, return_dict=False, **common)
        guess = unet(mixed, steps, down_block_additional_residuals=down, mid_block_additional_residual=middle, **common)
        return F.mse_loss(guess.sample, target)

    def show(folder: Path) -> None:
        net.save_pretrained(folder / "out")

    return train(plan, {"controlnet": net}, step_loss, show, fresh) / "out"


def run_flux(
    plan: Plan,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    words: flux.Words,
    fresh: bool = False,
) -> Path:
    """Train the Flux family's ControlNet and save it as ``out``; return that path."""
    for module in (transformer, words.clip, words.t5):
        module.requires_grad_(False)
    net = build_flux(transformer).to(plan.device)
    pool = Pool(vae, 1600, np.random.default_rng((plan.seed, 80)), draw_loose, edges)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor

    def pack(latents: Tensor) -> Tensor:
        count, channels, height, width = latents.shape
        return FluxPipeline._pack_latents(latents, count, channels, height, width)

    def step_loss(step: int, rng: Rng) -> Tensor:
        _, latents, scenes, hints = pool.batch(6, rng)
        count = len(scenes)
        embeds, pooled = words.embed(captions_of(scenes, rng, outside=0.2))
        times = 1 - torch.rand(count) ** 1.5 * 0.8
        mixed, target, places = flux.flow((latents - shift) * scale, times)
        with torch.no_grad():
            hint = pack((vae.encode(to_tensor(hints).to(embeds.device)).latent_dist.mean - shift) * scale)
        common = {
            "hidden_states": mixed,
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "timestep": times.to(embeds.device),
            "img_ids": places,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=embeds.device),
        }
        double, single = net(controlnet_cond=hint, return_dict=False, **common)
        guess = transformer(controlnet_block_samples=double, controlnet_single_block_samples=single, **common).sample
        return F.mse_loss(guess, target)

    def show(folder: Path) -> None:
        net.save_pretrained(folder / "out")

    return train(plan, {"controlnet": net}, step_loss, show, fresh) / "out"
