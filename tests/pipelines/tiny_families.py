"""Tiny pipelines of many families: random weights, tokenizers trained on a few lines, saved as ordinary folders.

    python tests/pipelines/tiny_families.py FOLDER [NAME...]

Each family is a builder and the arguments its stock call takes here. Weights come from a seed, so that a folder can
be made anew anywhere. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import torch
import transformers as t
from PIL import Image
from tiny_parts import (
    LINES,
    SIDE,
    clip_text,
    clip_tokenizer,
    flow,
    gemma_text,
    gemma_tokenizer,
    kl_vae,
    qwen3_text,
    qwen_tokenizer,
    t5_text,
    t5_tokenizer,
)

# Families


def _flux_parts(in_channels: int, guidance: bool, out_channels: int | None = None) -> dict[str, Any]:
    clip, t5 = clip_tokenizer(), t5_tokenizer(512)
    transformer = d.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )
    return {
        "scheduler": flow(),
        "vae": kl_vae(16),
        "text_encoder": clip_text(clip),
        "tokenizer": clip,
        "text_encoder_2": t5_text(t5),
        "tokenizer_2": t5,
        "transformer": transformer,
    }


def flux_dev() -> Any:
    return d.FluxPipeline(**_flux_parts(64, guidance=True))


def flux_fill() -> Any:
    return d.FluxFillPipeline(**_flux_parts(384, guidance=True, out_channels=64))


def flux_kontext() -> Any:
    return d.FluxKontextPipeline(**_flux_parts(64, guidance=True))


def _sd_parts(in_channels: int, width: int = 32) -> dict[str, Any]:
    clip = clip_tokenizer()
    unet = d.UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = d.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )
    return {
        "vae": kl_vae(4),
        "text_encoder": clip_text(clip, width),
        "tokenizer": clip,
        "unet": unet,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd15(width: int = 32) -> Any:
    """The library knows it by a text encoder 768 wide."""
    return d.StableDiffusionPipeline(**_sd_parts(4, width))


def sd15_inpaint() -> Any:
    return d.StableDiffusionInpaintPipeline(**_sd_parts(9))


def flux2_klein(distilled: bool = True) -> Any:
    tokenizer = qwen_tokenizer()
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    # The latents' statistics are buffers of a batch norm; those of a new one would hide a mistake in their use.
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 1.5)
    transformer = d.Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return d.Flux2KleinPipeline(
        scheduler=flow(),
        vae=vae,
        text_encoder=qwen3_text(tokenizer, 28, t.Qwen3ForCausalLM),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )


def z_image(shift: float = 3.0) -> Any:
    tokenizer = qwen_tokenizer()
    transformer = d.ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    # Made with torch.empty, so they must be given numbers here (a trap: no reset_parameters of its own).
    torch.nn.init.normal_(transformer.x_pad_token, std=0.02)
    torch.nn.init.normal_(transformer.cap_pad_token, std=0.02)
    return d.ZImagePipeline(
        scheduler=flow(use_dynamic_shifting=False, shift=shift),
        vae=kl_vae(16),
        text_encoder=qwen3_text(tokenizer, 3, t.Qwen3Model),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image_control(refined: str = "") -> Any:
    """A ControlNet of the tiny Z-Image; `refined` ones (2.1) read masks too, and guide the refiner."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = d.ZImageControlNetModel(
            control_layers_places=[0, 1],
            control_refiner_layers_places=[0],
            control_in_dim=33 if refined else 16,
            add_control_noise_refiner=refined or None,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
        enliven(network)
    return network.eval().requires_grad_(False)


def qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    text_encoder = t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            },
            image_token_id=ids["image_pad"],
            video_token_id=ids["video_pad"],
            vision_start_token_id=ids["vision_start"],
            vision_end_token_id=ids["vision_end"],
        )
    )
    vae = d.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    transformer = d.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return d.QwenImagePipeline(
        scheduler=flow(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


def sd3() -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer(256)
    transformer = d.SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=64,
    )
    return d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=False),
        vae=kl_vae(16),
        text_encoder=clip_text(clip, projected=True),
        tokenizer=clip,
        text_encoder_2=clip_text(clip, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(t5, 64),
        tokenizer_3=t5,
    )


def chroma() -> Any:
    t5 = t5_tokenizer(512)
    transformer = d.ChromaTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=64,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return d.ChromaPipeline(
        scheduler=flow(), vae=kl_vae(16), text_encoder=t5_text(t5), tokenizer=t5, transformer=transformer
    )


def lumina2() -> Any:
    tokenizer = gemma_tokenizer()
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=16,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )
    return d.Lumina2Pipeline(
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=False, shift=6.0),
        vae=kl_vae(16),
        text_encoder=gemma_text(tokenizer),
        tokenizer=tokenizer,
    )


def aura_flow() -> Any:
    t5 = t5_tokenizer(256)
    encoder = t.UMT5EncoderModel(
        t.UMT5Config(
            vocab_size=len(t5),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            use_cache=False,
        )
    )
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    torch.nn.init.normal_(transformer.register_tokens, std=0.02)
    return d.AuraFlowPipeline(
        tokenizer=t5,
        text_encoder=encoder,
        vae=kl_vae(4),
        transformer=transformer,
        scheduler=flow(use_dynamic_shifting=False, shift=1.73),
    )


def pixart_sigma() -> Any:
    t5 = t5_tokenizer(300)
    transformer = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=32,
        use_additional_conditions=False,
        norm_num_groups=4,
    )
    return d.PixArtSigmaPipeline(
        tokenizer=t5,
        text_encoder=t5_text(t5),
        vae=kl_vae(4),
        transformer=transformer,
        scheduler=d.DPMSolverMultistepScheduler(),
    )


def sana() -> Any:
    tokenizer = gemma_tokenizer()
    vae = d.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.41407,
    )
    transformer = d.SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )
    return d.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_text(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=d.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def picture(side: int = SIDE, seed: int = 3) -> Image.Image:
    """A picture of blocks in random colours, to start from."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def mask(side: int = SIDE) -> Image.Image:
    """White in the middle, which is to be repainted."""
    pixels = np.zeros((side, side), np.uint8)
    pixels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 255
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Tiny:
    """A builder, and what its stock call needs beyond prompt, size, steps and generator."""

    build: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    pictures: Callable[[], dict[str, Any]] = dict


FAMILIES: dict[str, Tiny] = {
    "flux-dev": Tiny(flux_dev, {"guidance_scale": 3.5, "max_sequence_length": 64}),
    "flux-dev-true-cfg": Tiny(
        flux_dev, {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": "sea", "max_sequence_length": 64}
    ),
    "flux-fill": Tiny(
        flux_fill,
        {"guidance_scale": 30.0, "max_sequence_length": 64},
        lambda: {"image": picture(), "mask_image": mask()},
    ),
    "flux-kontext": Tiny(
        flux_kontext,
        {"guidance_scale": 2.5, "max_sequence_length": 64, "max_area": SIDE * SIDE, "_auto_resize": False},
        lambda: {"image": picture()},
    ),
    "sd15": Tiny(sd15, {"guidance_scale": 7.5, "negative_prompt": "sea"}),
    "sd15-inpaint": Tiny(
        sd15_inpaint, {"guidance_scale": 7.5, "strength": 1.0}, lambda: {"image": picture(), "mask_image": mask()}
    ),
    "flux2-klein": Tiny(flux2_klein, {"guidance_scale": 1.0, "max_sequence_length": 64}),
    "flux2-klein-base": Tiny(lambda: flux2_klein(distilled=False), {"guidance_scale": 4.0, "max_sequence_length": 64}),
    "flux2-klein-edit": Tiny(
        flux2_klein, {"guidance_scale": 1.0, "max_sequence_length": 64}, lambda: {"image": [picture(), picture(96, 4)]}
    ),
    "z-image-turbo": Tiny(z_image, {"guidance_scale": 0.0}),
    "z-image": Tiny(lambda: z_image(6.0), {"guidance_scale": 4.0, "negative_prompt": "sea"}),
    "qwen-image": Tiny(qwen_image, {"true_cfg_scale": 4.0, "negative_prompt": "sea"}),
    "sd3": Tiny(sd3, {"guidance_scale": 4.5, "negative_prompt": "sea", "max_sequence_length": 64}),
    "chroma": Tiny(chroma, {"guidance_scale": 4.0, "negative_prompt": "sea", "max_sequence_length": 64}),
    "lumina2": Tiny(lumina2, {"guidance_scale": 4.0}),
    "aura-flow": Tiny(aura_flow, {"guidance_scale": 3.5}),
    "pixart-sigma": Tiny(pixart_sigma, {"guidance_scale": 4.5, "use_resolution_binning": False}),
    "sana": Tiny(sana, {"guidance_scale": 4.5, "use_resolution_binning": False, "complex_human_instruction": None}),
}


def build(name: str, seed: int = 0) -> Any:
    """The pipeline, its weights drawn from `seed` and made large enough to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[name].build()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module):
                # A VAE's decoder stays as it is: livelier ones clip their pictures to black and white.
                enliven(component.encoder if name.startswith("vae") else component)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def enliven(network: torch.nn.Module) -> None:
    """Weights of unit gain, and none that are zero.

    As constructed, gates and last layers are zero and embeddings faint: then prompts and references hardly show, and a
    test with a tolerance of 2/255 would pass with the wrong ones.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def arguments(name: str, prompt: str = LINES[0], seed: int = 7, steps: int = 4, side: int = SIDE) -> dict[str, Any]:
    """Everything the stock call takes for one picture; the generator is new, so call it anew for each."""
    tiny = FAMILIES[name]
    return {
        "prompt": prompt,
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        **tiny.arguments,
        **tiny.pictures(),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or FAMILIES:
        build(name).save_pretrained(folder / name)


if __name__ == "__main__":
    main()
