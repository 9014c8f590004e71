"""Renames the tensors of a checkpoint's parts to the names of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from stable_diffusion_server.pipelines.loading.checkpoint_configs import count
from stable_diffusion_server.pipelines.loading.packed_weights import PackedWeight
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

# `torch` is read without its types, so mypy takes the union for a variable unless it is annotated.
Tensor: TypeAlias = torch.Tensor | PackedWeight
Tensors: TypeAlias = dict[str, Tensor]

# Names of one block of Flux's transformer: original → diffusers.
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
_OUTER = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
_NORMS = {
    "img_attn.norm.query_norm": "norm_q",
    "img_attn.norm.key_norm": "norm_k",
    "txt_attn.norm.query_norm": "norm_added_q",
    "txt_attn.norm.key_norm": "norm_added_k",
}
_LEAVES = ("weight", "bias")
# Parts of XLabs' ControlNets that the transformer has too.
_XLABS_PARTS = frozenset(("double_blocks", "time_in", "vector_in", "guidance_in", "txt_in", "img_in"))
# Convolutions of XLabs' hint block, between which are activations → diffusers'.
_HINT_LAYERS = {"0": "conv_in", **{str(2 * n + 2): f"blocks.{n}" for n in range(6)}, "14": "conv_out"}

# T5 as llama.cpp names it → as transformers does.
_T5_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
# Attention of a VAE as diffusers named it before 0.11 → today.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_T5_OUTER = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}


def unet_names(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensors:
    """A UNet: diffusers' own table, which moves tensors without touching them."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    return dict(convert_ldm_unet_checkpoint(prefixed, config))


def vae_names(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    """A VAE: diffusers' own table, which also flattens the attention's 1 × 1 convolutions."""
    return dict(convert_ldm_vae_checkpoint({f"vae.{name}": tensor for name, tensor in tensors.items()}, config))


def renewed_vae_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """A VAE in the names of diffusers, whose old versions named the attention otherwise."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        start, _, leaf = name.rpartition(".")
        block, _, layer = start.rpartition(".")
        new = _OLD_ATTENTION.get(layer) if block.endswith("mid_block.attentions.0") else None
        renamed[f"{block}.{new}.{leaf}" if new else name] = tensor
    return renamed


def clip_g_names(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """CLIP-G in OpenCLIP's names, or in those of transformers, which are left as they are."""
    if "token_embedding.weight" not in tensors:
        return dict(tensors)
    projection = tensors.get("text_projection")
    if projection is None:
        raise WeightFileError("text_projection is missing")
    prefix = "conditioner.embedders.1.model."
    prefixed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    return dict(convert_open_clip_checkpoint(None, prefixed, prefix=prefix))


def t5_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """T5's encoder in the names of transformers or llama.cpp."""
    if "token_embd.weight" not in tensors:
        return dict(tensors)
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("enc.blk."):
            number, _, rest = name.removeprefix("enc.blk.").partition(".")
            part, _, leaf = rest.rpartition(".")
            renamed[f"encoder.block.{number}.{_T5_BLOCK.get(part, part)}.{leaf}"] = tensor
        elif name in _T5_OUTER:
            renamed[_T5_OUTER[name]] = tensor
    return renamed


def transformer_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """Flux's transformer. diffusers' own converter has the width 3072 written into it, and takes no packed weights."""
    width, found = int(_required(tensors, "img_in.weight").shape[0]), _block_names(tensors)
    for leaf in _LEAVES:
        # Black Forest Labs keep shift before scale, diffusers scale before shift.
        modulation = _required(tensors, f"final_layer.adaLN_modulation.1.{leaf}")
        shift, scale = rows_of(modulation, 0, width), rows_of(modulation, width, 2 * width)
        found[f"norm_out.linear.{leaf}"] = torch.cat([_plain(scale), _plain(shift)])
    return found


def xlabs_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """A ControlNet for Flux by XLabs: blocks as the transformer's, and a hint block of eight convolutions."""
    found = _block_names(tensors)
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "controlnet_blocks":
            found[name] = tensor
        elif part == "pos_embed_input":
            found[f"controlnet_x_embedder.{rest}"] = tensor
        elif part == "input_hint_block":
            layer, _, leaf = rest.partition(".")
            if layer not in _HINT_LAYERS:
                raise WeightFileError(f"{name[:100]} is no layer of the hint block")
            found[f"{part}.{_HINT_LAYERS[layer]}.{leaf}"] = tensor
        elif part not in _XLABS_PARTS:
            raise WeightFileError(f"{name[:100]} belongs to another model")
    return found


def _block_names(tensors: Mapping[str, Tensor]) -> Tensors:
    """The blocks and embedders of a network of Flux's architecture."""
    width = int(_required(tensors, "img_in.weight").shape[0])
    found: Tensors = {}

    def move(old: str, new: str) -> None:
        found.update({f"{new}.{leaf}": tensors[f"{old}.{leaf}"] for leaf in _LEAVES if f"{old}.{leaf}" in tensors})

    def split(old: str, names: tuple[str, ...]) -> None:
        """Split rows into parts of `width` rows; the last part takes the rest."""
        for leaf in _LEAVES:
            whole = _required(tensors, f"{old}.{leaf}")
            for i, name in enumerate(names):
                last = whole.shape[0] if i + 1 == len(names) else (i + 1) * width
                found[f"{name}.{leaf}"] = rows_of(whole, i * width, last)

    for old, new in _OUTER.items():
        move(old, new)
    for i in range(count(tensors, r"double_blocks\.(\d+)\.")):
        here, there = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for old, new in _DOUBLE.items():
            move(f"{here}.{old}", f"{there}.{new}")
        split(f"{here}.img_attn.qkv", tuple(f"{there}.attn.to_{name}" for name in "qkv"))
        split(f"{here}.txt_attn.qkv", tuple(f"{there}.attn.add_{name}_proj" for name in "qkv"))
        for old, new in _NORMS.items():
            found[f"{there}.attn.{new}.weight"] = _required(tensors, f"{here}.{old}.scale")
    for i in range(count(tensors, r"single_blocks\.(\d+)\.")):
        here, there = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        for old, new in _SINGLE.items():
            move(f"{here}.{old}", f"{there}.{new}")
        attention = tuple(f"{there}.attn.to_{name}" for name in "qkv")
        split(f"{here}.linear1", (*attention, f"{there}.proj_mlp"))
        for old, new in (("query", "norm_q"), ("key", "norm_k")):
            found[f"{there}.attn.{new}.weight"] = _required(tensors, f"{here}.norm.{old}_norm.scale")
    return found


def rows_of(tensor: Tensor, first: int, last: int) -> Tensor:
    """Some rows of a tensor, packed or not."""
    return tensor.rows(first, last) if isinstance(tensor, PackedWeight) else tensor[first:last]


def _plain(tensor: Tensor) -> torch.Tensor:
    return tensor.unpack(torch.float32) if isinstance(tensor, PackedWeight) else tensor


def _required(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise WeightFileError(f"{name} is missing")
    return tensors[name]
