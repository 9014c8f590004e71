"""Tiny pipelines of classes that only their own call draws, beside those of `tiny_families`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import tiny_families
import tokenizers as tk
import torch
import transformers as t
from tiny_parts import (
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

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def sd_parts(**changes: Any) -> dict[str, Any]:
    """Parts of an SD with a UNet of other channels or inputs; a width of 1024 is SD 2's."""
    width = changes.pop("cross_attention_dim", 32)
    parts = dict(tiny_families.build("sd15").components)
    if width != 32:
        parts["text_encoder"] = clip_text(parts["tokenizer"], width)
    config = {**parts["unet"].config, "cross_attention_dim": width, **changes}
    config.pop("_use_default_values")  # it names keys to ignore
    parts["unet"] = d.UNet2DConditionModel.from_config(config)
    return {**parts, **NO_CHECKER}


def sd2_v(width: int = 32) -> Any:
    """SD 2 predicts the velocity."""
    parts = sd_parts(cross_attention_dim=width)
    parts["scheduler"] = d.DDIMScheduler.from_config(parts["scheduler"].config, prediction_type="v_prediction")
    return d.StableDiffusionPipeline(**parts)


def sd_pag() -> Any:
    """Perturbed attention: attention processors are set for the duration of a call."""
    return d.StableDiffusionPAGPipeline(**sd_parts())


def lcm() -> Any:
    """Latent consistency: guidance is an input of the UNet."""
    parts = sd_parts(time_cond_proj_dim=16)
    parts["scheduler"] = d.LCMScheduler.from_config(parts["scheduler"].config)
    return d.LatentConsistencyModelPipeline(**parts)


def instruct_pix2pix() -> Any:
    """The picture to edit is in four more channels."""
    return d.StableDiffusionInstructPix2PixPipeline(**sd_parts(in_channels=8))


def deepfloyd_if() -> Any:
    """Pixels without a VAE, and the old callback."""
    t5 = t5_tokenizer()
    unet = d.UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = d.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        prediction_type="epsilon", variance_type="learned_range",
    )  # fmt: skip
    return d.IFPipeline(
        tokenizer=t5, text_encoder=t5_text(t5), unet=unet, scheduler=scheduler, watermarker=None, **NO_CHECKER
    )


def _movq() -> Any:
    """Eight pixels to one."""
    return d.VQModel(
        block_out_channels=[32] * 4,
        down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
        in_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        out_channels=3,
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        vq_embed_dim=4,
    )


def kandinsky3() -> Any:
    """A VQ decoder and attention over T5."""
    t5 = t5_tokenizer(128)
    unet = d.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    scheduler = d.DDPMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="squaredcos_cap_v2")
    return d.Kandinsky3Pipeline(tokenizer=t5, text_encoder=t5_text(t5), unet=unet, scheduler=scheduler, movq=_movq())


def kandinsky22() -> Any:
    """Two stages: a prior draws the embedding of a picture, and a UNet the picture."""
    clip = clip_tokenizer()
    vision = t.CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=37, num_attention_heads=4, num_channels=3,
        num_hidden_layers=2, patch_size=16,
    )  # fmt: skip
    prior = d.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 1.5)
    unet = d.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = d.DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="epsilon", thresholding=False,
    )  # fmt: skip
    return d.KandinskyV22CombinedPipeline(
        unet=unet,
        scheduler=scheduler,
        movq=_movq(),
        prior_prior=prior,
        prior_image_encoder=t.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip_text(clip, projected=True),
        prior_tokenizer=clip,
        prior_scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
        ),
        prior_image_processor=t.CLIPImageProcessorPil(crop_size=32, size=32, do_normalize=True, do_resize=True),
    )


def amused() -> Any:
    """Tokens of pictures, unmasked step by step."""
    clip = clip_tokenizer()
    transformer = d.UVit2DModel(
        hidden_size=32, use_bias=False, hidden_dropout=0.0, cond_embed_dim=32, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=32, vocab_size=32, codebook_size=32, in_channels=32,
        block_out_channels=32, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
        num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0, intermediate_size=32, layer_norm_eps=1e-06,
        ln_elementwise_affine=True,
    )  # fmt: skip
    vqvae = d.VQModel(
        act_fn="silu", block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, in_channels=3,
        latent_channels=8, layers_per_block=1, norm_num_groups=8, num_vq_embeddings=32, out_channels=3,
        sample_size=32, up_block_types=["UpDecoderBlock2D"] * 2, mid_block_add_attention=False,
        lookup_from_codebook=True,
    )  # fmt: skip
    return d.AmusedPipeline(
        vqvae=vqvae,
        tokenizer=clip,
        text_encoder=clip_text(clip, projected=True),
        transformer=transformer,
        scheduler=d.AmusedScheduler(mask_token_id=31),
    )


def _with_beginning(tokenizer: Any) -> Any:
    """Empty prompts have a token too, as in the real vocabularies."""
    first, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, number)]
    )
    return tokenizer


def cogview4() -> Any:
    """GLM reads the prompt."""
    tokenizer = _with_beginning(gemma_tokenizer())
    text_encoder = t.GlmModel(
        t.GlmConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    transformer = d.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4, rope_axes_dim=(256, 256),
    )  # fmt: skip
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    return d.CogView4Pipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=kl_vae(4), transformer=transformer, scheduler=scheduler
    )


def cogview3() -> Any:
    """T5, and a schedule of videos."""
    t5 = t5_tokenizer(224)
    transformer = d.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return d.CogView3PlusPipeline(
        tokenizer=t5, text_encoder=t5_text(t5), vae=kl_vae(4), transformer=transformer,
        scheduler=d.CogVideoXDDIMScheduler(),
    )  # fmt: skip


def ovis() -> Any:
    """Qwen 3 reads the prompt."""
    tokenizer = qwen_tokenizer()
    transformer = d.OvisImageTransformer2DModel(
        in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return d.OvisImagePipeline(
        scheduler=flow(), vae=kl_vae(16), text_encoder=qwen3_text(tokenizer, 2, t.Qwen3Model), tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def bria() -> Any:
    """T5, and packed latents that the class itself scales."""
    t5 = t5_tokenizer(128)
    transformer = d.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[0, 8, 8],
    )  # fmt: skip
    return d.BriaPipeline(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=False), vae=kl_vae(4, shift_factor=0.0),
        text_encoder=t5_text(t5), tokenizer=t5,
    )  # fmt: skip


def lumina() -> Any:
    """Gemma, and an older transformer."""
    tokenizer = _with_beginning(gemma_tokenizer())
    transformer = d.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True,
        cross_attention_dim=32, scaling_factor=1.0,
    )  # fmt: skip
    return d.LuminaPipeline(
        transformer=transformer, scheduler=flow(use_dynamic_shifting=False), vae=kl_vae(4),
        text_encoder=gemma_text(tokenizer), tokenizer=tokenizer,
    )  # fmt: skip


def pixart_alpha() -> Any:
    """The parts of the tiny PixArt Sigma."""
    return d.PixArtAlphaPipeline(**tiny_families.build("pixart-sigma").components)


def hunyuan_dit() -> Any:
    """Two encoders that each have a part of the prompt's width."""
    clip, t5 = clip_tokenizer(), t5_tokenizer(256)
    encoder = t.BertModel(
        t.BertConfig(
            vocab_size=len(clip),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
        )
    )
    transformer = d.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, hidden_size=24,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    return d.HunyuanDiTPipeline(
        vae=kl_vae(4), text_encoder=encoder, tokenizer=clip, text_encoder_2=t5_text(t5), tokenizer_2=t5,
        transformer=transformer, scheduler=d.DDPMScheduler(), **NO_CHECKER,
    )  # fmt: skip


def hidream() -> Any:
    """Four encoders, Llama the last, and experts."""
    clip, t5, llama = clip_tokenizer(), t5_tokenizer(128), qwen_tokenizer()
    long = {**clip_text(clip).config.to_dict(), "max_position_embeddings": 248}
    encoders = [t.CLIPTextModelWithProjection(t.CLIPTextConfig(**long)) for _ in range(2)]
    clip.model_max_length = 248
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        force_inference_output=True,
    )  # fmt: skip
    config = t.LlamaConfig(
        vocab_size=len(llama), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return d.HiDreamImagePipeline(
        scheduler=flow(use_dynamic_shifting=False), vae=kl_vae(4, shift_factor=0.1), text_encoder=encoders[0],
        tokenizer=clip, text_encoder_2=encoders[1], tokenizer_2=clip, text_encoder_3=t5_text(t5), tokenizer_3=t5,
        text_encoder_4=t.LlamaForCausalLM(config), tokenizer_4=llama,
        transformer=transformer,
    )  # fmt: skip


def z_image_blocks() -> Any:
    """The blocks of Z-Image over the parts of the tiny pipeline."""
    return of_blocks("ZImageModularPipeline", tiny_families.build("z-image").components)


def sd3_blocks() -> Any:
    """The blocks of SD 3 likewise."""
    return of_blocks("StableDiffusion3ModularPipeline", tiny_families.build("sd3").components)


def klein_blocks() -> Any:
    """The blocks of FLUX.2 klein, which have no guider."""
    return of_blocks("Flux2KleinModularPipeline", tiny_families.build("flux2-klein").components)


def anima() -> Any:
    """Drawn by blocks alone: a small Qwen 3, T5's tokens, and the transformer of Cosmos."""
    tokenizer, t5 = qwen_tokenizer(), t5_tokenizer(64)
    qwen = tiny_families.build("qwen-image")
    transformer = d.CosmosTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True, extra_pos_embed_type=None,
    )  # fmt: skip
    conditioner = d.AnimaTextConditioner(
        source_dim=32, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=2, target_vocab_size=len(t5),
        min_sequence_length=64,
    )  # fmt: skip
    parts = {
        "text_encoder": qwen3_text(tokenizer, 2, t.Qwen3Model), "tokenizer": tokenizer, "t5_tokenizer": t5,
        "text_conditioner": conditioner, "transformer": transformer, "vae": qwen.vae,
        "scheduler": flow(use_dynamic_shifting=False),
    }  # fmt: skip
    return of_blocks("AnimaModularPipeline", parts)


def of_blocks(class_name: str, parts: dict[str, Any]) -> Any:
    """A modular pipeline over parts, those that its blocks expect."""
    kind = getattr(d, class_name)
    pipeline = kind(blocks=getattr(d, kind.default_blocks_name)())
    known = {spec.name for spec in pipeline.blocks.expected_components}
    pipeline.update_components(**{name: part for name, part in parts.items() if name in known and part is not None})
    return pipeline


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd2-v": sd2_v,
    "sd-pag": sd_pag,
    "lcm": lcm,
    "instruct-pix2pix": instruct_pix2pix,
    "deepfloyd-if": deepfloyd_if,
    "kandinsky3": kandinsky3,
    "kandinsky22": kandinsky22,
    "amused": amused,
    "cogview4": cogview4,
    "cogview3": cogview3,
    "ovis": ovis,
    "bria": bria,
    "lumina": lumina,
    "pixart-alpha": pixart_alpha,
    "hunyuan-dit": hunyuan_dit,
    "hidream": hidream,
    "z-image-blocks": z_image_blocks,
    "sd3-blocks": sd3_blocks,
    "klein-blocks": klein_blocks,
    "anima": anima,
}


def build(name: str, seed: int = 0) -> Any:
    """The pipeline, its weights drawn from `seed` and made large enough to matter, as `tiny_families.build` does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = FAMILIES[name]()
        for part_name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
                tiny_families.enliven(part.encoder if part_name in ("vae", "movq", "vqvae") else part)
    if hasattr(pipeline, "blocks"):
        _without_bars(pipeline.blocks)
    else:
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _without_bars(block: Any) -> None:
    for inner in (getattr(block, "sub_blocks", None) or {}).values():
        if hasattr(inner, "set_progress_bar_config"):
            inner.set_progress_bar_config(disable=True)
        _without_bars(inner)


__all__ = ["FAMILIES", "SIDE", "build", "of_blocks", "sd2_v"]
