"""Configurations of a checkpoint's parts: widths, depths and channels from shapes, the rest from the package's JSON."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

Shapes = Mapping[str, tuple[int, ...]]

CONFIGS = Path(__file__).parent / "configs"
# Channels of one attention head in SDXL's UNet, in CLIP and in T5.
_HEAD = 64
# The refiner has a block more than SDXL's base, without attention.
_REFINER_BLOCKS = 4
# SD 1.5 has twelve, the refiner as many. Renaming takes time with their square.
_MOST_INPUTS = 64
_DIGITS = 6
_UNETS = {"sdxl": "SDXL", "sd15": "SD 1.5"}


@functools.cache
def base_configs(family: str) -> Mapping[str, Mapping[str, Any]]:
    """What the package says of a family (`sdxl`, `sd15` or `flux`), by component."""
    read: dict[str, dict[str, Any]] = json.loads((CONFIGS / f"{family}.json").read_text())
    return read


def unet_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The configuration of a UNet of `sdxl` or `sd15` with original names.

    Raises `WeightFileError` for another architecture.
    """
    return {
        **unet_inputs(shapes, family),
        "out_channels": side_of(shapes, "out.2.weight", 0),
        **unet_additions(shapes, family, "label_emb.0.0.weight"),
    }


def unet_inputs(shapes: Shapes, family: str) -> dict[str, Any]:
    """The half of a UNet's configuration that its ControlNets share. Raises `WeightFileError` as `unet_config`."""
    inputs = count(shapes, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    layers = (downs[0] if downs else inputs) - 1
    if layers < 1 or inputs > _MOST_INPUTS or inputs % (layers + 1) or "middle_block.1.norm.weight" not in shapes:
        raise WeightFileError(f"the UNet is not laid out as {_UNETS[family]}'s (pruned, or of another family)")
    blocks = range(inputs // (layers + 1))
    first = [1 + block * (layers + 1) for block in blocks]
    channels = [side_of(shapes, f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in first]
    depths = [count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in first]
    return {
        **unet_blocks(family, channels, depths, layers),
        "in_channels": side_of(shapes, "input_blocks.0.0.weight", 1),
        "cross_attention_dim": side_of(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": len(shape_of(shapes, "middle_block.1.proj_in.weight")) == 2,
    }


def unet_additions(shapes: Shapes, family: str, name: str) -> dict[str, Any]:
    """What a UNet of `sdxl` takes beside the prompt, by the tensor of that `name`; `sd15` takes nothing."""
    return {"projection_class_embeddings_input_dim": side_of(shapes, name, 1)} if family == "sdxl" else {}


def unet_blocks(family: str, channels: Sequence[int], depths: Sequence[int], layers: int) -> dict[str, Any]:
    """The blocks of a UNet: `channels` of each, transformer layers (`depths`) in each, `layers` of each.

    Raises `WeightFileError` for another architecture.
    """
    attends = [depth > 0 for depth in depths]
    if family == "sdxl" and not attends[-1] and len(channels) != _REFINER_BLOCKS:
        raise WeightFileError("the UNet is not laid out as SDXL's (no attention in its last block)")
    base = base_configs(family)["denoiser"]
    return {
        **base,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attended else "DownBlock2D" for attended in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attends)],
        # The block in the middle is as deep as the last one is said to be.
        "transformer_layers_per_block": [*(max(depth, 1) for depth in depths[:-1]), depths[-1] or max(depths)],
        # SD 1.5 has eight heads of any width; diffusers calls their number so.
        "attention_head_dim": base.get("attention_head_dim") or [width // _HEAD for width in channels],
    }


def transformer_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a Flux transformer with original names."""
    base = base_configs("flux")["denoiser"]
    return {
        **base,
        **transformer_channels(shapes, "img_in.weight", "final_layer.linear.weight"),
        "num_attention_heads": side_of(shapes, "img_in.weight", 0) // int(base["attention_head_dim"]),
        "num_layers": count(shapes, r"double_blocks\.(\d+)\."),
        "num_single_layers": count(shapes, r"single_blocks\.(\d+)\."),
        "joint_attention_dim": side_of(shapes, "txt_in.weight", 1),
        "pooled_projection_dim": side_of(shapes, "vector_in.in_layer.weight", 1),
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def transformer_channels(shapes: Shapes, first: str, last: str) -> dict[str, int | None]:
    """The channels of a Flux transformer, by its first and last layer; Fill takes more of them than it gives."""
    taken, given = side_of(shapes, first, 1), side_of(shapes, last, 0)
    return {"in_channels": taken, "out_channels": None if given == taken else given}


class VaeNames(NamedTuple):
    """How a layout names a VAE's tensors: its levels, their blocks, and a tensor of the attention in the middle."""

    levels: str = "encoder.down"
    blocks: str = "block"
    attention: str = "decoder.mid.attn_1.q.weight"


_ORIGINAL_VAE = VaeNames()


def vae_config(shapes: Shapes, family: str, names: VaeNames = _ORIGINAL_VAE) -> dict[str, Any]:
    """The configuration of a VAE, by default with original names.

    The file does not tell the scale of its latents: that of the family is taken.
    """
    levels = range(count(shapes, rf"{re.escape(names.levels)}\.(\d+)\."))
    first = f"{names.levels}.0.{names.blocks}"
    return {
        **base_configs(family)["vae"],
        "block_out_channels": [
            side_of(shapes, f"{names.levels}.{level}.{names.blocks}.0.conv2.weight", 0) for level in levels
        ],
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "layers_per_block": count(shapes, rf"{re.escape(first)}\.(\d+)\."),
        "latent_channels": side_of(shapes, "decoder.conv_in.weight", 1),
        "mid_block_add_attention": names.attention in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_config(shapes: Shapes, family: str, component: str) -> dict[str, Any]:
    """The configuration of a CLIP text encoder with the names of transformers."""
    words, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight")
    projection = shapes.get("text_projection.weight", (width, width))
    return {
        **base_configs(family)[component],
        "vocab_size": words,
        "hidden_size": width,
        "num_attention_heads": max(width // _HEAD, 1),
        "num_hidden_layers": count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "intermediate_size": side_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "projection_dim": projection[0],
    }


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a T5 encoder with the names of transformers."""
    words, width = shape_of(shapes, "shared.weight")
    inner = side_of(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight", 0)
    return {
        **base_configs("flux")["text_encoder_2"],
        "vocab_size": words,
        "d_model": width,
        "d_kv": _HEAD,
        "d_ff": side_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        "num_heads": inner // _HEAD,
        "num_layers": count(shapes, r"encoder\.block\.(\d+)\."),
    }


def count(shapes: Mapping[str, object], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name; 0 if it finds none.

    Raises `WeightFileError` for a number that leaves gaps, since lists of this length are made.
    """
    found = {match[1] for match in (re.match(pattern, name) for name in shapes) if match is not None}
    if any(len(number) > _DIGITS for number in found) or max(map(int, found), default=0) > len(shapes):
        raise WeightFileError("the numbers of its layers leave gaps")
    return max((int(number) + 1 for number in found), default=0)


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there. Raises `WeightFileError`."""
    if name not in shapes or not shapes[name]:
        raise WeightFileError(f"{name} is missing")
    return shapes[name]


def side_of(shapes: Shapes, name: str, axis: int) -> int:
    """One side of the shape of a tensor that must be there. Raises `WeightFileError`."""
    shape = shape_of(shapes, name)
    if len(shape) <= axis:
        raise WeightFileError(f"{name} has the shape {shape}")
    return shape[axis]
