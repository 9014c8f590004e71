"""Tiny pipelines of newer classes, most of which read the prompt with a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import tiny_families
import torch
import transformers as t
from stock_siblings import sibling
from tiny_parts import (
    clip_text,
    clip_tokenizer,
    flow,
    gemma_tokenizer,
    kl_vae,
    qwen3_text,
    qwen_tokenizer,
    t5_text,
)

WIDTH = 32


def _qwen3_vl(tokenizer: Any, kind: Any, layers: int = 2) -> Any:
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    config = t.Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    return kind(config)


def krea2() -> Any:
    """Hidden states of several layers of Qwen3-VL, and Qwen-Image's VAE."""
    tokenizer = qwen_tokenizer()
    transformer = d.Krea2Transformer2DModel(
        in_channels=64, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=64,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return d.Krea2Pipeline(
        scheduler=flow(), vae=tiny_families.build("qwen-image").vae, text_encoder=_qwen3_vl(tokenizer, t.Qwen3VLModel),
        tokenizer=tokenizer, transformer=transformer, text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def hunyuan_image() -> Any:
    """Qwen2.5-VL, and ByT5 for words in quotes; guidance is a component."""
    qwen, byt5 = tiny_families.build("qwen-image"), t.ByT5Tokenizer()
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=32, block_out_channels=(32, 32, 32, 32, 32, 64),
        layers_per_block=1, spatial_compression_ratio=32, sample_size=64, scaling_factor=0.75,
    )  # fmt: skip
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    guiders = {name: d.AdaptiveProjectedMixGuidance() for name in ("guider", "ocr_guider")}
    # It reads the last layer but two.
    config = t.Qwen2_5_VLConfig.from_dict(qwen.text_encoder.config.to_dict())
    config.text_config.num_hidden_layers = 3
    config.text_config.layer_types = ["full_attention"] * 3
    return d.HunyuanImagePipeline(
        scheduler=flow(use_dynamic_shifting=False), vae=vae,
        text_encoder=t.Qwen2_5_VLForConditionalGeneration(config), tokenizer=qwen.tokenizer,
        text_encoder_2=t5_text(byt5), tokenizer_2=byt5, transformer=transformer, **guiders,
    )  # fmt: skip


def kandinsky5(kind: str = "Kandinsky5T2IPipeline") -> Any:
    """Qwen2.5-VL and CLIP; a transformer for videos of one frame. That for edits has the picture beside the latents."""
    from stable_diffusion_server.pipelines.loading.vision_processor import PictureProcessor

    qwen, clip = tiny_families.build("qwen-image"), clip_tokenizer()
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=32, in_text_dim2=32, time_dim=32, out_visual_dim=16, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
        visual_cond=kind == "Kandinsky5I2IPipeline",
    )  # fmt: skip
    images = t.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    return getattr(d, kind)(
        transformer=transformer, vae=kl_vae(16), text_encoder=qwen.text_encoder,
        tokenizer=PictureProcessor(images, qwen.tokenizer), text_encoder_2=clip_text(clip), tokenizer_2=clip,
        scheduler=flow(use_dynamic_shifting=False),
    )  # fmt: skip


def _t5gemma(tokenizer: Any) -> Any:
    module = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
        "max_position_embeddings": 512, "sliding_window": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    config = t.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    return t.T5GemmaEncoderModel(config).encoder


def prx() -> Any:
    """T5-Gemma's encoder."""
    tokenizer = gemma_tokenizer()
    transformer = d.PRXTransformer2DModel(
        in_channels=16, patch_size=2, context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8]
    )
    return d.PRXPipeline(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=False), text_encoder=_t5gemma(tokenizer),
        tokenizer=tokenizer, vae=kl_vae(16), default_sample_size=64,
    )  # fmt: skip


def prx_pixel() -> Any:
    """Pixels without a VAE."""
    tokenizer = qwen_tokenizer()
    transformer = d.PRXTransformer2DModel(
        in_channels=3, patch_size=8, context_in_dim=WIDTH, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8]
    )
    return d.PRXPixelPipeline(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=False),
        text_encoder=qwen3_text(tokenizer, 2, t.Qwen3Model), tokenizer=tokenizer, default_sample_size=64,
    )  # fmt: skip


def _wan_vae() -> Any:
    """Sixteen pixels to one, by patches of two."""
    return d.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    )  # fmt: skip


def fibo(kind: str = "BriaFiboPipeline") -> Any:
    """SmolLM3 reads a description."""
    tokenizer = qwen_tokenizer()
    encoder = t.SmolLM3ForCausalLM(
        t.SmolLM3Config(
            vocab_size=128001, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,  # its number of no text
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    transformer = d.BriaFiboTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=[4, 6, 6], text_encoder_dim=WIDTH,
    )  # fmt: skip
    return getattr(d, kind)(
        transformer=transformer, scheduler=flow(), vae=_wan_vae(), text_encoder=encoder, tokenizer=tokenizer
    )


def cascade() -> Any:
    """A prior draws the embedding of a picture, and a decoder the picture from both."""
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    clip = clip_tokenizer()
    blocks: dict[str, Any] = {
        "timestep_ratio_embedding_dim": 16, "patch_size": 1, "conditioning_dim": 32, "block_out_channels": (32, 32),
        "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
        "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        "clip_text_pooled_in_channels": 32, "dropout": (0.0, 0.0),
    }  # fmt: skip
    prior = d.StableCascadeUNet(
        in_channels=16, out_channels=16, clip_text_in_channels=32, clip_image_in_channels=32, switch_level=(False,),
        **blocks,
    )  # fmt: skip
    decoder = d.StableCascadeUNet(
        **{**blocks, "in_channels": 4, "out_channels": 4, "effnet_in_channels": 16, "pixel_mapper_in_channels": 3,
           "patch_size": 2, "timestep_conditioning_type": ("sca",)},
    )  # fmt: skip
    return d.StableCascadeCombinedPipeline(
        tokenizer=clip, text_encoder=clip_text(clip, projected=True), decoder=decoder,
        scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32),
        prior_prior=prior, prior_text_encoder=clip_text(clip, projected=True), prior_tokenizer=clip,
        prior_scheduler=d.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def wuerstchen() -> Any:
    """The older form of the same two stages."""
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    clip = clip_tokenizer()
    return d.WuerstchenCombinedPipeline(
        tokenizer=clip, text_encoder=clip_text(clip),
        decoder=WuerstchenDiffNeXt(
            c_cond=32, c_hidden=[32], nhead=[2], blocks=[2], level_config=["CTA"], inject_effnet=[True], clip_embd=32,
            dropout=[0.0],
        ),
        scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=32),
        prior_tokenizer=clip, prior_text_encoder=clip_text(clip),
        prior_prior=WuerstchenPrior(c_in=16, c=32, c_cond=32, c_r=16, depth=1, nhead=2, dropout=0.0),
        prior_scheduler=d.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def _mistral3(tokenizer: Any, layers: int, kind: Any) -> Any:
    config = t.Mistral3Config(
        text_config=t.MistralConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048,
        ).to_dict(),
        vision_config=t.PixtralVisionConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=8,
        ).to_dict(),
    )  # fmt: skip
    return kind(config)


def ernie() -> Any:
    """Mistral 3, and FLUX.2's VAE."""
    tokenizer = qwen_tokenizer()
    transformer = d.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=64, in_channels=128, out_channels=128,
        text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return d.ErnieImagePipeline(
        transformer=transformer, vae=tiny_families.build("flux2-klein").vae,
        text_encoder=_mistral3(tokenizer, 3, t.Mistral3Model), tokenizer=tokenizer,
        scheduler=flow(use_dynamic_shifting=False),
    )  # fmt: skip


def z_omni() -> Any:
    """SigLIP looks at references."""
    parts = tiny_families.build("z-image").components
    vision = t.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=16
    )
    config = {**parts["transformer"].config, "siglip_feat_dim": 32}
    config.pop("_use_default_values", None)
    transformer = d.ZImageTransformer2DModel.from_config(config)
    for name in ("x_pad_token", "cap_pad_token", "siglip_pad_token"):
        torch.nn.init.normal_(getattr(transformer, name), std=0.02)
    return d.ZImageOmniPipeline(
        **{**parts, "transformer": transformer}, siglip=t.Siglip2VisionModel(vision),
        siglip_processor=t.Siglip2ImageProcessorPil(max_num_patches=16),
    )  # fmt: skip


def qwen_edit(kind: str) -> Any:
    """The processor that reads prompts with pictures."""
    from stable_diffusion_server.pipelines.loading.vision_processor import PictureProcessor

    images = t.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    processor = PictureProcessor(images, tiny_families.build("qwen-image").tokenizer)
    return sibling(kind, "qwen-image", {"processor": processor})


def sana_sprint(kind: str = "SanaSprintPipeline") -> Any:
    """Guidance is an input, and the schedule that of trigonometric flow."""
    parts = tiny_families.build("sana")
    config = {**parts.transformer.config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    config.pop("_use_default_values", None)
    return sibling(
        kind, "sana",
        {"transformer": d.SanaTransformer2DModel.from_config(config), "scheduler": d.SCMScheduler()},
    )  # fmt: skip


def sdxl(kind: str = "StableDiffusionXLPipeline") -> Any:
    """Two CLIP encoders, and sizes as inputs."""
    clip = clip_tokenizer()
    edits = "Instruct" in kind
    unet = d.UNet2DConditionModel(
        in_channels=8 if edits else 4, out_channels=4, sample_size=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=(2, 4), norm_num_groups=8, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=1,
    )  # fmt: skip
    given = {
        "vae": kl_vae(4), "text_encoder": clip_text(clip), "tokenizer": clip,
        "text_encoder_2": clip_text(clip, projected=True), "tokenizer_2": clip_tokenizer(), "unet": unet,
        "scheduler": d.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    }  # fmt: skip
    if "Modular" in kind:
        import tiny_stock

        return tiny_stock.of_blocks(kind, given)
    return getattr(d, kind)(**given, add_watermarker=False)


NEWER: dict[str, Callable[[], Any]] = {
    "Krea2Pipeline": krea2,
    "HunyuanImagePipeline": hunyuan_image,
    "Kandinsky5T2IPipeline": kandinsky5,
    "Kandinsky5I2IPipeline": lambda: kandinsky5("Kandinsky5I2IPipeline"),
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
    "BriaFiboPipeline": fibo,
    "ErnieImagePipeline": ernie,
    "ZImageOmniPipeline": z_omni,
    "QwenImageEditPipeline": lambda: qwen_edit("QwenImageEditPipeline"),
    "QwenImageEditInpaintPipeline": lambda: qwen_edit("QwenImageEditInpaintPipeline"),
    "StableCascadeCombinedPipeline": cascade,
    "WuerstchenCombinedPipeline": wuerstchen,
    "SanaSprintPipeline": sana_sprint,
    "SanaSprintImg2ImgPipeline": lambda: sana_sprint("SanaSprintImg2ImgPipeline"),
    "StableDiffusionXLPAGPipeline": lambda: sdxl("StableDiffusionXLPAGPipeline"),
    "StableDiffusionXLInstructPix2PixPipeline": lambda: sdxl("StableDiffusionXLInstructPix2PixPipeline"),
    "StableDiffusionXLPipeline": sdxl,
}
