"""Models at their published sizes without a download: SDXL and FLUX.1-schnell with random weights, others with none.

Tokenizers and schedulers are those of the embedded models, since they cost nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from stable_diffusion_server.pipelines import MODELS, ModelSpec
from stable_diffusion_server.pipelines.loading.components import empty_pipeline
from stable_diffusion_server.pipelines.loading.footprint import dtype_of

EMBEDDED = Path(__file__).resolve().parent.parent / "models"

# The published configurations, where they differ from the classes' defaults.
CLIP_L = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
CONTROL = {name: value for name, value in UNET.items() if name not in ("sample_size", "up_block_types")} | {
    "_class_name": "ControlNetModel"
}
FLUX_CONTROL = {
    "_class_name": "FluxControlNetModel",
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 0,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
    "conditioning_embedding_channels": 16,
    "patch_size": 2,
}
FLUX_VAE = VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
KLEIN_4B = {
    "_class_name": "Flux2Transformer2DModel",
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
SD3_TRANSFORMER = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
PIXART = {
    "sample_size": 128,
    "caption_channels": 4096,
    "out_channels": 8,
    "use_additional_conditions": False,
    "norm_type": "ada_norm_single",
}
QWEN25_VL_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "flux": {"transformer": TRANSFORMER, "vae": FLUX_VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
}
Skeleton = dict[str, tuple[Any, dict[str, Any]]]
_VAE, _FLUX_VAE = (diffusers.AutoencoderKL, VAE), (diffusers.AutoencoderKL, FLUX_VAE)
_CLIP_L, _T5 = (transformers.CLIPTextModel, CLIP_L), (transformers.T5EncoderModel, T5_XXL)
_CLIP_L_PROJECTED, _CLIP_G = ((transformers.CLIPTextModelWithProjection, config) for config in (CLIP_L, CLIP_G))


def _flux(**changes: Any) -> Skeleton:
    transformer = (diffusers.FluxTransformer2DModel, {**TRANSFORMER, "guidance_embeds": True, **changes})
    return {"transformer": transformer, "vae": _FLUX_VAE, "text_encoder": _CLIP_L, "text_encoder_2": _T5}


# Of other families: (part → class and configuration), for `skeleton`.
SKELETONS: dict[str, Skeleton] = {
    "sd15": {"unet": (diffusers.UNet2DConditionModel, SD15_UNET), "vae": _VAE, "text_encoder": _CLIP_L},
    "sdxl": {
        "unet": (diffusers.UNet2DConditionModel, UNET),
        "vae": (diffusers.AutoencoderKL, VAE | {"force_upcast": True}),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
    "flux-dev": _flux(),
    "flux-kontext": _flux(),
    "flux-fill": _flux(in_channels=384, out_channels=64),
    "sd3": {
        "transformer": (diffusers.SD3Transformer2DModel, SD3_TRANSFORMER),
        "vae": _FLUX_VAE,
        "text_encoder": _CLIP_L_PROJECTED,
        "text_encoder_2": _CLIP_G,
        "text_encoder_3": _T5,
    },
    "qwen-image": {
        "transformer": (diffusers.QwenImageTransformer2DModel, {}),
        "vae": (diffusers.AutoencoderKLQwenImage, {}),
        "text_encoder": (transformers.Qwen2_5_VLForConditionalGeneration, QWEN25_VL_7B),
    },
    "chroma": {
        "transformer": (diffusers.ChromaTransformer2DModel, {}),
        "vae": _FLUX_VAE,
        "text_encoder": _T5,
    },
    "pixart-sigma": {
        "transformer": (diffusers.PixArtTransformer2DModel, PIXART),
        "vae": _VAE,
        "text_encoder": _T5,
    },
    "flux2": {
        "transformer": (diffusers.Flux2Transformer2DModel, KLEIN_4B),
        "vae": (diffusers.AutoencoderKLFlux2, {}),
        "text_encoder": (transformers.Qwen3ForCausalLM, QWEN3_4B),
    },
    "z-image": {
        "transformer": (diffusers.ZImageTransformer2DModel, {}),
        "vae": (diffusers.AutoencoderKL, FLUX_VAE),
        "text_encoder": (transformers.Qwen3Model, QWEN3_4B),
    },
}


def skeleton(family: str) -> dict[str, torch.nn.Module]:
    """The networks of a family of `SKELETONS` on the meta device, by component."""
    parts: dict[str, torch.nn.Module] = {}
    with torch.device("meta"):
        for name, (kind, config) in SKELETONS[family].items():
            own = kind.config_class(**config) if kind.__module__.startswith("transformers") else None
            parts[name] = kind.from_config(config) if own is None else kind(own)
    return parts


def write_configurations(folder: Path, facts: ModelSpec) -> None:
    """Write a real model's configuration files below `folder`, without weights."""
    embedded = EMBEDDED / MODELS[facts.name].folder
    shutil.copytree(embedded, folder / facts.folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, configuration in CONFIGURATIONS[facts.name].items():
        write_config(folder / facts.folder / part, configuration)
    if facts.control_folder is not None:
        write_config(folder / facts.control_folder, CONTROL if facts.name == "sdxl" else FLUX_CONTROL)


def write_config(folder: Path, configuration: dict[str, Any]) -> None:
    """Write the configuration of one component."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration))


def random_pipeline(facts: ModelSpec, folder: Path, device: torch.device, *, control: bool = False) -> Any:
    """The stock pipeline for these configurations with small random weights, and its ControlNet.

    Its outputs are meaningless but finite. Returns (pipeline, ControlNet or None).
    """
    parts: dict[str, Any] = empty_pipeline(facts, folder)
    guide = parts.pop("control", None)
    dtype = dtype_of(facts, device)
    for part in [*parts.values(), *([guide] if control and guide is not None else [])]:
        part.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in part.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for module in part.modules():
            # Position ids are buffers; to_empty leaves them uninitialised.
            if hasattr(module, "position_ids"):
                module.position_ids.copy_(torch.arange(module.position_ids.shape[-1], device=device)[None])
    stock = getattr(diffusers, facts.pipeline_class)
    embedded = stock.from_pretrained(EMBEDDED / MODELS[facts.name].folder)
    pipeline = stock(**{**embedded.components, **parts})
    if pipeline.vae.config.force_upcast and dtype == torch.float16:
        pipeline.vae.to(torch.float32)  # as the loader does
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, (guide if control else None)
