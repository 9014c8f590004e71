"""Trains both families' Canny ControlNets beside a frozen denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name torch's own documentation gives it
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from training import flux, sdxl
from training.captions import Rng, draw_scene
from training.latent_cache import LatentCache, captions_of
from training.loop import Plan, train
from training.synthetic_landscapes import Landscape
from training.synthetic_shapes import Scene


def draw_loose(rng: Rng) -> Scene | Landscape:
    """Sample a scene, mostly of the kind whose caption does not state the geometry."""
    return draw_scene(rng, "free" if rng.random() < 0.65 else None)


def stir(layers: list[nn.Module], spread: float) -> None:
    """Initialise layers with small random weights. From zeros, little was learned in minutes."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=spread)


def build_sdxl(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet initialised with the convolutions of the UNet's encoder; it has no cross-attention.

    It reads the edges; the UNet reads the prompt. Its time embedding cannot be as narrow as the UNet's, so it
    starts from random weights.
    """
    torch.manual_seed(41)
    shared = ControlNetModel.from_unet(unet, load_weights_from_unet=False).config
    config = {name: value for name, value in shared.items() if not name.startswith("_")}
    config |= {
        "down_block_types": ("DownBlock2D",) * len(config["block_out_channels"]),
        "mid_block_type": "UNetMidBlock2D",
        "addition_embed_type": None,
        "conditioning_embedding_out_channels": (8, 16, 32, 64, 96),
    }
    net = ControlNetModel(**config)
    own = net.state_dict()
    taken = {name: value for name, value in unet.state_dict().items() if own.get(name, value[:0]).shape == value.shape}
    net.load_state_dict(own | taken)
    nn.init.kaiming_normal_(net.controlnet_cond_embedding.conv_out.weight, nonlinearity="linear")
    stir([*net.controlnet_down_blocks, net.controlnet_mid_block], 0.02)
    return net


def build_flux(transformer: FluxTransformer2DModel) -> FluxControlNetModel:
    """Return a ControlNet of 2 double blocks, initialised with a copy of the transformer's."""
    torch.manual_seed(42)
    net = FluxControlNetModel.from_transformer(
        transformer, num_layers=2, num_single_layers=0, attention_head_dim=32, num_attention_heads=5
    )
    stir([net.controlnet_x_embedder], 0.05)
    stir(list(net.controlnet_blocks), 0.02)
    return net


def run_sdxl(
    plan: Plan, unet: UNet2DConditionModel, vae: AutoencoderKL, words: sdxl.Words, fresh: bool = False
) -> Path:
    """Train the SDXL family's ControlNet, save it as ``out`` and return that path."""
    unet.requires_grad_(False)
    net = build_sdxl(unet).to(plan.device, memory_format=torch.channels_last)
    store, shares = LatentCache("edges"), sdxl.signal_shares()

    def step_loss(step: int, rng: Rng) -> Tensor:
        batch = store.batch(8, rng)
        count = len(batch.scenes)
        embeds, pooled = words.embed(captions_of(batch.scenes, rng))
        kept = (torch.rand(count, device=embeds.device) > 0.3).float()
        steps = torch.where(torch.rand(count) < 0.4, sdxl.draw_steps(count), torch.randint(400, 1000, (count,)))
        mixed, target = sdxl.noised(sdxl.folded(batch.latents.to(embeds.device), vae), steps, shares)
        mixed = mixed.contiguous(memory_format=torch.channels_last)
        common = {
            "encoder_hidden_states": embeds * kept[:, None, None],
            "added_cond_kwargs": {
                "text_embeds": pooled * kept[:, None],
                "time_ids": sdxl.size_ids(batch.size, count, embeds.device),
            },
        }
        hint = batch.edges()[0].to(embeds.device).expand(-1, 3, -1, -1)
        steps = steps.to(embeds.device)
        down, middle = net(mixed, steps, controlnet_cond=hint, return_dict=False, **common)
        guess = unet(mixed, steps, down_block_additional_residuals=down, mid_block_additional_residual=middle, **common)
        return F.mse_loss(guess.sample, target)

    def show(folder: Path) -> None:
        net.save_pretrained(folder / "out")

    return train(plan, {"controlnet": net}, step_loss, show, fresh) / "out"


def run_flux(
    plan: Plan, transformer: FluxTransformer2DModel, vae: AutoencoderKL, words: flux.Words, fresh: bool = False
) -> Path:
    """Train the Flux family's ControlNet, save it as ``out`` and return that path."""
    transformer.requires_grad_(False)
    net = build_flux(transformer).to(plan.device)
    store = LatentCache("edges")

    def step_loss(step: int, rng: Rng) -> Tensor:
        batch = store.batch(8, rng)
        count = len(batch.scenes)
        embeds, pooled = words.embed(captions_of(batch.scenes, rng, outside=0.2))
        times = torch.where(torch.rand(count) < 0.4, flux.draw_times(count), 1 - torch.rand(count) ** 1.5 * 0.8)
        mixed, target, places = flux.flow(flux.folded(batch.latents.to(embeds.device), vae), times)
        common = {
            "hidden_states": mixed,
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "timestep": times.to(embeds.device),
            "img_ids": places,
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=embeds.device),
        }
        hint = flux.packed(flux.folded(batch.edges()[1].to(embeds.device), vae))
        double, single = net(controlnet_cond=hint, return_dict=False, **common)
        guess = transformer(controlnet_block_samples=double, controlnet_single_block_samples=single, **common).sample
        return F.mse_loss(guess, target)

    def show(folder: Path) -> None:
        net.save_pretrained(folder / "out")

    return train(plan, {"controlnet": net}, step_loss, show, fresh) / "out"
