"""Small models with random weights, written as people download them: original key names, one file or several.

The names are those of CompVis' SD 1.5, Stability's SDXL, Black Forest Labs' Flux, OpenCLIP and ComfyUI. The stand-ins
have text encoders of unlike widths, since diffusers tells two of one width apart by nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from stable_diffusion_server.pipelines.loading.checkpoint_configs import base_configs
from stable_diffusion_server.pipelines.loading.tokenizer_files import clip_tokenizer

Tensors = dict[str, torch.Tensor]
WORDS = 49_408


def sdxl_pipeline(seed: int = 0, *, in_channels: int = 4, scheduler: Mapping[str, Any] | None = None) -> Any:
    """A small SDXL with SDXL's layout: three blocks of two layers, CLIP of 2 and of 13 layers."""
    torch.manual_seed(seed)
    base = base_configs("sdxl")
    unet = diffusers.UNet2DConditionModel(
        **base["denoiser"],
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(64, 64, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 1, 2],
        cross_attention_dim=192,
        use_linear_projection=True,
        projection_class_embeddings_input_dim=128 + 6 * 256,
    )
    parts = {
        "unet": unet,
        "vae": _vae("sdxl", latent_channels=4),
        "text_encoder": transformers.CLIPTextModel(_clip("sdxl", "text_encoder", 64, 2)),
        "text_encoder_2": transformers.CLIPTextModelWithProjection(_clip("sdxl", "text_encoder_2", 128, 13)),
    }
    _enliven(parts)
    name = "StableDiffusionXLInpaintPipeline" if in_channels == 9 else "StableDiffusionXLPipeline"
    pipeline = getattr(diffusers, name)(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config({**base["scheduler"], **(scheduler or {})}),
        add_watermarker=False,
    )
    return _quiet(pipeline)


def refiner_unet(seed: int = 7) -> Any:
    """The UNet of a small refiner for `sdxl_pipeline`: four blocks, of which the two in the middle have attention."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        **base_configs("sdxl")["denoiser"],
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64, 128, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=[1, 1, 2, 1],
        cross_attention_dim=128,
        use_linear_projection=True,
        projection_class_embeddings_input_dim=128 + 5 * 256,
    )
    _enliven({"unet": unet})
    return unet


def sd15_pipeline(seed: int = 0, *, in_channels: int = 4, width: int = 64) -> Any:
    """A small SD 1.5 with its layout: four blocks of two layers; the library knows it by a text encoder 768 wide."""
    torch.manual_seed(seed)
    base = base_configs("sd15")
    unet = diffusers.UNet2DConditionModel(
        **base["denoiser"],
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64, 64, 64),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=width,
    )
    parts = {
        "unet": unet,
        "vae": _vae("sd15", latent_channels=4),
        "text_encoder": transformers.CLIPTextModel(_clip("sd15", "text_encoder", width, 2)),
    }
    _enliven(parts)
    name = "StableDiffusionInpaintPipeline" if in_channels == 9 else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name)(
        **parts,
        tokenizer=clip_tokenizer(),
        scheduler=diffusers.PNDMScheduler.from_config(base["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipeline)


def flux_pipeline(seed: int = 0, *, guided: bool = False, tokenizer: Path, kind: str = "") -> Any:
    """A small Flux (width 128) with the tokenizer of the embedded one; `guided` as FLUX.1-dev.

    `kind` is `Fill`, `Kontext` or empty.
    """
    torch.manual_seed(seed)
    base = base_configs("flux")
    t5_words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    parts = {
        "transformer": diffusers.FluxTransformer2DModel(
            **base["denoiser"],
            in_channels=384 if kind == "Fill" else 64,
            out_channels=64,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=1,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=guided,
        ),
        "vae": _vae("flux", latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": transformers.CLIPTextModel(_clip("flux", "text_encoder", 64, 2)),
        "text_encoder_2": transformers.T5EncoderModel(
            transformers.T5Config(
                **base["text_encoder_2"],
                vocab_size=len(t5_words),
                d_model=64,
                d_kv=64,
                d_ff=128,
                num_heads=1,
                num_layers=2,
            )
        ),
    }
    _enliven(parts)
    scheduler = base["scheduler" if guided else "scheduler_schnell"]
    pipeline = getattr(diffusers, f"Flux{kind}Pipeline")(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_words,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler),
    )
    return _quiet(pipeline)


def _vae(family: str, **changes: Any) -> Any:
    blocks = 4
    return diffusers.AutoencoderKL(
        **base_configs(family)["vae"],
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        **changes,
    )


def _clip(family: str, component: str, width: int, layers: int) -> Any:
    return transformers.CLIPTextConfig(
        **base_configs(family)[component],
        vocab_size=WORDS,
        hidden_size=width,
        num_attention_heads=width // 64,
        num_hidden_layers=layers,
        intermediate_size=2 * width,
        projection_dim=width,
    )


def _enliven(parts: Mapping[str, Any]) -> None:
    """Make the random weights large enough that images depend on all of them, and round them to fp16."""
    for part in parts.values():
        part.eval().requires_grad_(False)
        for name, weight in part.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.2 / weight[0].numel() ** 0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.05)
            weight.copy_(weight.half().float())


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write(file: Path, tensors: Tensors, dtype: torch.dtype | None = torch.float16) -> Path:
    """Write a file; floating tensors in `dtype`, or as they are if it is `None`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cast = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in cast.items()}, file, metadata={"format": "pt"})
    return file
