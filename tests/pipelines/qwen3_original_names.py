"""Tensors of tiny FLUX.2 klein and Z-Image in the names of their authors."""

from __future__ import annotations

from typing import Any

import torch
from original_names import Tensors, vae_tensors

_KLEIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}


def klein_tensors(transformer: Any) -> Tensors:
    """The transformer as Black Forest Labs name it."""
    given, found = transformer.state_dict(), {}
    for name, tensor in given.items():
        place, _, leaf = name.rpartition(".")
        group, _, rest = place.partition(".")
        number, _, part = rest.partition(".")
        if place == "norm_out.linear":  # shift before scale
            found["final_layer.adaLN_modulation.1.weight"] = torch.cat([*reversed(tensor.chunk(2))])
        elif group == "transformer_blocks" and part in _DOUBLE:
            new = _DOUBLE[part]
            found[f"double_blocks.{number}.{new}.{'scale' if 'norm' in new else leaf}"] = tensor
        elif group == "single_transformer_blocks":
            new = _SINGLE[part]
            found[f"single_blocks.{number}.{new}.{'scale' if 'norm' in new else leaf}"] = tensor
        elif group != "transformer_blocks":
            found[f"{_KLEIN[place]}.{leaf}"] = tensor
    for number in range(transformer.config.num_layers):
        attention = f"transformer_blocks.{number}.attn"
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            joined = torch.cat([given[f"{attention}.{name}.weight"] for name in names])
            found[f"double_blocks.{number}.{stream}_attn.qkv.weight"] = joined
    return found


def klein_vae_tensors(vae: Any) -> Tensors:
    """The VAE as ComfyUI's users have it: the quantizing convolutions belong to encoder and decoder."""
    found = vae_tensors(vae)
    for half, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        for leaf in ("weight", "bias"):
            found[f"{half}.{name}.{leaf}"] = found.pop(f"{name}.{leaf}")
    return found | {f"bn.{name}": tensor for name, tensor in vae.bn.state_dict().items()}


def z_image_tensors(transformer: Any) -> Tensors:
    """The transformer in its authors' names."""
    given, found = transformer.state_dict(), {}
    for name, tensor in given.items():
        new = name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer")
        new = new.replace("attention.to_out.0", "attention.out")
        new = new.replace("attention.norm_q", "attention.q_norm").replace("attention.norm_k", "attention.k_norm")
        if ".attention.to_q." in name:
            parts = [given[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            found[new] = tensor
    return found
