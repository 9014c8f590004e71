"""Configurations of denoisers and VAEs with the tensor names of diffusers, from shapes, where no config.json is."""

from __future__ import annotations

from typing import Any

from stable_diffusion_server.pipelines.loading.checkpoint_configs import (
    Shapes,
    VaeNames,
    base_configs,
    count,
    shape_of,
    side_of,
    transformer_channels,
    unet_additions,
    unet_blocks,
    vae_config,
)
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

_MIDDLE = "mid_block.attentions.0"


def diffusers_unet_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The configuration of a UNet of `sdxl` or `sd15`. Raises `WeightFileError` for another architecture."""
    return {
        **diffusers_unet_inputs(shapes, family),
        "out_channels": side_of(shapes, "conv_out.weight", 0),
        **unet_additions(shapes, family, "add_embedding.linear_1.weight"),
    }


def diffusers_unet_inputs(shapes: Shapes, family: str) -> dict[str, Any]:
    """The half of a UNet's configuration that its ControlNets share. Raises `WeightFileError` likewise."""
    blocks = range(count(shapes, r"down_blocks\.(\d+)\."))
    if not blocks:
        raise WeightFileError("the UNet is not laid out as Stable Diffusion's (no down_blocks)")
    channels = [side_of(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 0) for i in blocks]
    depths = [count(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.") for i in blocks]
    return {
        **unet_blocks(family, channels, depths, count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")),
        "in_channels": side_of(shapes, "conv_in.weight", 1),
        "cross_attention_dim": side_of(shapes, f"{_MIDDLE}.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(shape_of(shapes, f"{_MIDDLE}.proj_in.weight")) == 2,
    }


def diffusers_transformer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a Flux transformer."""
    channels = transformer_channels(shapes, "x_embedder.weight", "proj_out.weight")
    return {**base_configs("flux")["denoiser"], **transformer_sizes(shapes), **channels}


def transformer_sizes(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a Flux transformer that its ControlNets have too."""
    base = base_configs("flux")["denoiser"]
    embedders = "time_text_embed"
    return {
        "num_attention_heads": side_of(shapes, "x_embedder.weight", 0) // int(base["attention_head_dim"]),
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "num_single_layers": count(shapes, r"single_transformer_blocks\.(\d+)\."),
        "joint_attention_dim": side_of(shapes, "context_embedder.weight", 1),
        "pooled_projection_dim": side_of(shapes, f"{embedders}.text_embedder.linear_1.weight", 1),
        "guidance_embeds": f"{embedders}.guidance_embedder.linear_1.weight" in shapes,
    }


def diffusers_vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The configuration of a VAE; the scale of its latents is that of the family, since the file does not tell it."""
    names = VaeNames("encoder.down_blocks", "resnets", "decoder.mid_block.attentions.0.group_norm.weight")
    return vae_config(shapes, family, names)
