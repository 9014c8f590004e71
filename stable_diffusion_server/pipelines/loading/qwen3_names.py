"""Renames the tensors of FLUX.2 klein, Z-Image and Qwen3 to the names of diffusers and transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from stable_diffusion_server.pipelines.loading.checkpoint_configs import Shapes, count, side_of
from stable_diffusion_server.pipelines.loading.checkpoint_names import Tensors, rows_of, vae_names
from stable_diffusion_server.pipelines.loading.packed_weights import PackedWeight

# Names of klein: original → diffusers.
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_STREAMS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
# Names of Z-Image, by their beginning and by their part after a block.
_Z_OUTER = {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
_Z_ATTENTION = {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"}


def klein_names(tensors: Mapping[str, torch.Tensor | PackedWeight]) -> Tensors:
    """A FLUX.2 transformer in the names of diffusers. Names that are not known keep theirs, and are refused later."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        place, _, leaf = name.rpartition(".")
        group, _, rest = place.partition(".")
        leaf = "weight" if leaf == "scale" else leaf
        if place == "final_layer.adaLN_modulation.1":
            # Black Forest Labs keep shift before scale, diffusers scale before shift.
            plain = tensor.unpack(torch.float32) if isinstance(tensor, PackedWeight) else tensor
            found[f"norm_out.linear.{leaf}"] = torch.cat([*reversed(plain.chunk(2))])
        elif group in _BLOCKS:
            number, _, part = rest.partition(".")
            there = f"{_BLOCKS[group]}.{number}"
            for new, rows in _split(tensor, _STREAMS.get(part, (_BLOCK.get(part, part),))):
                found[f"{there}.{new}.{leaf}"] = rows
        else:
            found[f"{_OUTER.get(place, place)}.{leaf}"] = tensor
    return found


def klein_vae(tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """The configuration of FLUX.2's VAE and its tensors by diffusers' names; `tensors` have either names."""
    original = "decoder.mid.block_1.norm1.weight" in tensors
    levels, blocks = ("encoder.down", "block") if original else ("encoder.down_blocks", "resnets")
    decoder, first = ("decoder.up", "block") if original else ("decoder.up_blocks", "resnets")
    numbers = range(count(shapes, rf"{re.escape(levels)}\.(\d+)\."))
    widths = [side_of(shapes, f"{levels}.{i}.{blocks}.0.conv2.weight", 0) for i in numbers]
    given = [side_of(shapes, f"{decoder}.{i}.{first}.0.conv2.weight", 0) for i in numbers]
    given = given if original else given[::-1]
    config = {
        "block_out_channels": widths,
        "decoder_block_out_channels": given if given != widths else None,
        "down_block_types": ["DownEncoderBlock2D" for _ in numbers],
        "up_block_types": ["UpDecoderBlock2D" for _ in numbers],
        "layers_per_block": count(shapes, rf"{re.escape(levels)}\.0\.{blocks}\.(\d+)\."),
        "latent_channels": side_of(shapes, "decoder.conv_in.weight", 1),
        "norm_num_groups": min(32, widths[0] // 2) if widths else 32,
    }
    if not original:
        return config, dict(tensors)
    moved = {
        name.replace("decoder.post_quant_conv.", "post_quant_conv.").replace(
            "encoder.quant_conv.", "quant_conv."
        ): value
        for name, value in tensors.items()
    }
    statistics = {name: value for name, value in moved.items() if name.startswith("bn.")}
    return config, {**vae_names(moved, config), **statistics}


def z_image_names(tensors: Mapping[str, torch.Tensor | PackedWeight]) -> Tensors:
    """A Z-Image transformer in the names of diffusers."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name == "norm_final.weight":  # of no use in their own code either
            continue
        group, _, rest = name.partition(".")
        block, attention, part = name.partition(".attention.")
        layer, _, leaf = part.rpartition(".")
        if group in _Z_OUTER:
            found[f"{_Z_OUTER[group]}.{rest}"] = tensor
        elif attention:
            names = ("to_q", "to_k", "to_v") if layer == "qkv" else (_Z_ATTENTION.get(layer, layer),)
            found |= {f"{block}.attention.{new}.{leaf}": rows for new, rows in _split(tensor, names)}
        else:
            found[name] = tensor
    return found


def qwen3_names(tensors: Mapping[str, torch.Tensor | PackedWeight]) -> Tensors:
    """A Qwen3 with the names of transformers, without its head, which encodes nothing."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _split(
    tensor: torch.Tensor | PackedWeight, names: tuple[str, ...]
) -> list[tuple[str, torch.Tensor | PackedWeight]]:
    """Equal parts of the rows, by name; one name takes the whole tensor."""
    if len(names) == 1:
        return [(names[0], tensor)]
    height = tensor.shape[0] // len(names)
    return [(name, rows_of(tensor, i * height, (i + 1) * height)) for i, name in enumerate(names)]
