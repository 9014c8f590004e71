"""Configurations of FLUX.2 klein, Z-Image and their text encoder Qwen3, from the shapes of a file's tensors."""

from __future__ import annotations

from typing import Any

from stable_diffusion_server.pipelines.loading.checkpoint_configs import Shapes, base_configs, count, shape_of, side_of

_NORM = "double_blocks.0.img_attn.norm.query_norm.scale"


def klein_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a FLUX.2 transformer without guidance embedding, with original names."""
    width, head = side_of(shapes, "img_in.weight", 0), side_of(shapes, _NORM, 0)
    return {
        "in_channels": side_of(shapes, "img_in.weight", 1),
        "num_layers": count(shapes, r"double_blocks\.(\d+)\."),
        "num_single_layers": count(shapes, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": side_of(shapes, "txt_in.weight", 1),
        "timestep_guidance_channels": side_of(shapes, "time_in.in_layer.weight", 1),
        "mlp_ratio": side_of(shapes, "double_blocks.0.img_mlp.2.weight", 1) / width,
        "axes_dims_rope": [head // 4] * 4,
        "guidance_embeds": False,
    }


def z_image_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a Z-Image transformer with original names or those of diffusers."""
    original = "x_embedder.weight" in shapes
    embedder = "x_embedder.weight" if original else "all_x_embedder.2-1.weight"
    width = side_of(shapes, embedder, 0)
    head = side_of(shapes, f"layers.0.attention.{'q_norm' if original else 'norm_q'}.weight", 0)
    return {
        **base_configs("z-image")["denoiser"],
        "in_channels": side_of(shapes, embedder, 1) // 4,
        "dim": width,
        "n_layers": count(shapes, r"layers\.(\d+)\."),
        "n_refiner_layers": count(shapes, r"noise_refiner\.(\d+)\."),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": side_of(shapes, "cap_embedder.1.weight", 1),
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
    }


def qwen3_config(shapes: Shapes) -> dict[str, Any]:
    """The configuration of a Qwen3 with the names of transformers, without a head."""
    head = side_of(shapes, "layers.0.self_attn.q_norm.weight", 0)
    words, width = shape_of(shapes, "embed_tokens.weight")
    return {
        **base_configs("z-image")["text_encoder"],
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": side_of(shapes, "layers.0.mlp.gate_proj.weight", 0),
        "num_hidden_layers": count(shapes, r"layers\.(\d+)\."),
        "num_attention_heads": side_of(shapes, "layers.0.self_attn.q_proj.weight", 0) // head,
        "num_key_value_heads": side_of(shapes, "layers.0.self_attn.k_proj.weight", 0) // head,
        "head_dim": head,
    }
