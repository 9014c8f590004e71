"""Splits the tensors of a checkpoint into its parts, by their names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")

DENOISER, VAE, CLIP_L, CLIP_G, T5, QWEN3 = "denoiser", "vae", "clip_l", "clip_g", "t5", "qwen3"

# Family → part → component of the pipeline, and the folder of it in a diffusers folder.
COMPONENTS: Mapping[str, Mapping[str, str]] = {
    "sdxl": {DENOISER: "unet", VAE: "vae", CLIP_L: "text_encoder", CLIP_G: "text_encoder_2"},
    "sd15": {DENOISER: "unet", VAE: "vae", CLIP_L: "text_encoder"},
    "flux": {DENOISER: "transformer", VAE: "vae", CLIP_L: "text_encoder", T5: "text_encoder_2"},
    "flux2": {DENOISER: "transformer", VAE: "vae", QWEN3: "text_encoder"},
    "z-image": {DENOISER: "transformer", VAE: "vae", QWEN3: "text_encoder"},
}
# Component of the pipeline → its tokenizer's folder.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

# Part → the prefixes of its names in a checkpoint.
_PREFIXES = {
    DENOISER: ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet."),
    VAE: ("first_stage_model.", "vae."),
    CLIP_L: (
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
        "cond_stage_model.transformer.",
    ),
    CLIP_G: ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    T5: ("text_encoders.t5xxl.transformer.",),
}
# Part → a name that a file of this part alone has. A bare CLIP is known by its depth (see `bare_part`).
_BARE = (
    (DENOISER, "input_blocks.0.0.weight"),
    (DENOISER, "img_in.weight"),
    (DENOISER, "time_embedding.linear_1.weight"),
    (DENOISER, "x_embedder.weight"),
    (DENOISER, "all_x_embedder.2-1.weight"),
    (VAE, "decoder.conv_in.weight"),
    (T5, "encoder.block.0.layer.0.SelfAttention.q.weight"),
    (T5, "enc.blk.0.attn_q.weight"),
    (QWEN3, "model.layers.0.self_attn.q_norm.weight"),
    (QWEN3, "layers.0.self_attn.q_norm.weight"),
    (CLIP_G, "transformer.resblocks.0.mlp.c_fc.weight"),
)
_CLIP = "text_model.encoder.layers."
# A name of each network in the names of diffusers.
_DIFFUSERS = ("time_embedding.linear_1.weight", "x_embedder.weight", "decoder.mid_block.resnets.0.norm1.weight")
# CLIP-L has 12 layers, CLIP-G 32.
_LAYERS_OF_CLIP_L = 12


def split_parts(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """The tensors by part, without the prefix of the part; names of no part are left out."""
    if (bare := bare_part(tensors)) is not None:
        return {bare: dict(tensors)}
    parts: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        for part, prefixes in _PREFIXES.items():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                parts.setdefault(part, {})[name[len(prefix) :]] = tensor
                break
    return parts


def bare_part(names: Collection[str]) -> str | None:
    """The part that a file holds alone, under names without a prefix; `None` for a checkpoint of several parts."""
    for part, name in _BARE:
        if name in names:
            return part
    layers = {name[len(_CLIP) :].partition(".")[0] for name in names if name.startswith(_CLIP)}
    if not layers:
        return None
    return CLIP_L if len(layers) <= _LAYERS_OF_CLIP_L else CLIP_G


def has_diffusers_names(tensors: Collection[str]) -> bool:
    """Whether a denoiser or VAE has the tensor names of diffusers, not those of its authors."""
    return any(name in tensors for name in _DIFFUSERS)
