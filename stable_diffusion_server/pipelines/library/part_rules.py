"""Recognises the parts beside a denoiser: VAEs, text encoders, ControlNets, image prompts, embeddings, upscalers."""

from __future__ import annotations

from stable_diffusion_server.pipelines.library.file_headers import TensorHeader
from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind

_SD_VAE = "SD 1, SD 2 and SDXL have VAEs of the same tensors and other scales; a spec beside the file says which."
_FLUX_VAE = "Flux, Z-Image and SD 3 have VAEs of the same tensors and other scales; a spec beside the file says which."
# Names of the first layer of an IP-Adapter's image projection.
_IP_ADAPTER = tuple(
    f"image_proj.{part}" for part in ("proj.weight", "latents", "proj.0.weight", "perceiver_resampler.latents")
)
# Family by the width of its text embeddings.
_SD_BY_WIDTH = {768: ("sd15",), 1024: ("sd2",), 2048: ("sdxl",)}

# Prefixes that trainers leave before the names.
_PREFIXES = ("", "params_ema.", "params.", "module.", "netG.")
# Names of the first block of an RRDB network: Real-ESRGAN's, BSRGAN's, and the original's.
_RRDB = (
    ("body.0.rdb1.conv1.weight", "conv_first.weight", "real-esrgan"),
    ("RRDB_trunk.0.RDB1.conv1.weight", "conv_first.weight", "bsrgan"),
    ("model.1.sub.0.RDB1.conv1.0.weight", "model.0.weight", "esrgan"),
)
_OTHERS = (
    (("layers.0.residual_group.blocks.0.conv_block.cab.0.weight",), "hat"),
    (("layers.0.blocks.0.attn.attns.0.pos.pos1.0.weight",), "dat"),
    (("layers.0.residual_group.blocks.0.norm1.weight", "conv_first.weight"), "swinir"),
    (("body.0.weight", "body.1.weight", "body.2.weight"), "compact"),
    (("to_feat.weight", "feats.0.norm1.weight"), "safmn"),
    (("block_1.c1_r.sk.weight",), "span"),
)


def find_controlnet(header: TensorHeader) -> FileIdentity | None:
    """The ControlNet, control LoRA or T2I adapter in these tensors."""
    tensors = header.shapes
    if "lora_controlnet" in tensors:
        sdxl = "label_emb.0.0.up" in tensors or "label_emb.0.0.weight" in tensors
        return FileIdentity(Kind.CONTROL_LORA, ("sdxl",) if sdxl else ("sd15",), "sai", layout="original")
    if next(iter(tensors)).startswith("lllite_unet"):
        return FileIdentity(Kind.CONTROLNET, ("sdxl",), "lllite", layout="kohya")
    if "controlnet_x_embedder.weight" in tensors:
        return _transformer_controlnet(header)
    if "control_layers.0.adaLN_modulation.0.weight" in tensors or "control_all_x_embedder.2-1.weight" in tensors:
        return FileIdentity(Kind.CONTROLNET, ("z-image",), layout="diffusers")
    if "input_hint_block.0.weight" in tensors and "controlnet_blocks.0.weight" in tensors:
        return FileIdentity(Kind.CONTROLNET, ("flux",), "xlabs", layout="xlabs")
    if "controlnet_cond_embedding.conv_in.weight" in tensors:
        return _diffusers_controlnet(header)
    for prefix in ("control_model.", ""):
        if f"{prefix}input_hint_block.0.weight" in tensors and f"{prefix}zero_convs.0.0.weight" in tensors:
            return _original_controlnet(header, prefix)
    if "adapter.body.0.in_conv.weight" in tensors or "body.0.resnets.0.block1.weight" in tensors:
        return FileIdentity(Kind.CONTROLNET, ("sd15", "sdxl"), "t2i-adapter", layout="diffusers")
    if "body.0.block1.weight" in tensors and "conv_in.weight" in tensors:
        return FileIdentity(Kind.CONTROLNET, ("sd15", "sdxl"), "t2i-adapter", layout="original")
    return None


def _transformer_controlnet(header: TensorHeader) -> FileIdentity:
    channels = header.side("controlnet_x_embedder.weight", 1)
    if "txt_norm.weight" in header:
        return FileIdentity(Kind.CONTROLNET, ("qwen-image",), layout="diffusers", in_channels=channels)
    variant = "union" if "controlnet_mode_embedder.weight" in header else ""
    return FileIdentity(Kind.CONTROLNET, ("flux",), variant, layout="diffusers", in_channels=channels)


def _diffusers_controlnet(header: TensorHeader) -> FileIdentity:
    channels = header.side("conv_in.weight", 1)
    union = "task_embedding" in header or "control_add_embedding.linear_1.weight" in header
    variant = "union" if union else ""
    if "add_embedding.linear_1.weight" in header:
        return FileIdentity(Kind.CONTROLNET, ("sdxl",), variant, layout="diffusers", in_channels=channels)
    width = header.side("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", -1)
    return _sd_controlnet(width, variant, "diffusers", channels)


def _original_controlnet(header: TensorHeader, prefix: str) -> FileIdentity:
    channels = header.side(f"{prefix}input_blocks.0.0.weight", 1)
    if f"{prefix}label_emb.0.0.weight" in header:
        union = f"{prefix}task_embedding" in header or "task_embedding" in header
        return FileIdentity(
            Kind.CONTROLNET, ("sdxl",), "union" if union else "", layout="original", in_channels=channels
        )
    width = header.side(f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", -1)
    return _sd_controlnet(width, "", "original", channels)


def _sd_controlnet(width: int, variant: str, layout: str, channels: int) -> FileIdentity:
    families = _SD_BY_WIDTH.get(width, ())
    reason = "" if families else f"is a ControlNet for texts of width {width}, which no known Stable Diffusion has"
    return FileIdentity(Kind.CONTROLNET, families, variant, layout=layout, in_channels=channels, reason=reason)


def find_image_prompt(header: TensorHeader) -> FileIdentity | None:
    """The IP-Adapter or Redux in these tensors."""
    if "redux_up.weight" in header and "redux_down.weight" in header:
        return FileIdentity(Kind.IMAGE_PROMPT, ("flux",), "redux", layout="original")
    if "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight" in header:
        return FileIdentity(Kind.IMAGE_PROMPT, ("flux",), "ip-adapter", layout="xlabs")
    if not any(name in header for name in _IP_ADAPTER):
        return None
    keys = [shape[-1] for name, shape in header.shapes.items() if name.endswith("to_k_ip.weight") and shape]
    families = _SD_BY_WIDTH.get(keys[0], ()) if keys else ()
    faceid = any(name.endswith("to_q_lora.down.weight") for name in header.shapes)
    plus = "image_proj.latents" in header
    variant = "ip-adapter-faceid" if faceid else "ip-adapter-plus" if plus else "ip-adapter"
    return FileIdentity(Kind.IMAGE_PROMPT, families, variant, layout="original")


def find_vae(header: TensorHeader) -> FileIdentity | None:
    """The VAE in these tensors, or the tiny one."""
    for prefix in ("", "first_stage_model.", "vae."):
        if f"{prefix}decoder.conv_in.weight" in header and f"{prefix}decoder.conv_out.weight" in header:
            return _vae(header, prefix)
    if "decoder.middle.0.residual.0.gamma" in header or "decoder.mid_block.resnets.0.norm1.gamma" in header:
        layout = "original" if "decoder.middle.0.residual.0.gamma" in header else "diffusers"
        return FileIdentity(Kind.VAE, ("wan", "qwen-image"), layout=layout)
    return _tiny_vae(header)


def _vae(header: TensorHeader, prefix: str) -> FileIdentity:
    channels = header.side(f"{prefix}decoder.conv_in.weight", 1)
    original = f"{prefix}decoder.mid.block_1.norm1.weight" in header
    layout = "original" if original else "diffusers"
    if "bn.running_mean" in header or channels == 32:
        return FileIdentity(Kind.VAE, ("flux2",), layout=layout, in_channels=channels)
    known = {4: (("sd15", "sd2", "sdxl"), _SD_VAE), 16: (("flux", "sd3", "z-image"), _FLUX_VAE)}
    if channels not in known:
        reason = f"is a VAE with {channels} latent channels, and 4, 16 and 32 are known"
        return FileIdentity(Kind.VAE, layout=layout, in_channels=channels, reason=reason)
    families, remark = known[channels]
    return FileIdentity(Kind.VAE, families, layout=layout, in_channels=channels, remarks=(remark,))


def _tiny_vae(header: TensorHeader) -> FileIdentity | None:
    """TAESD: names are numbers of layers, with the names of both halves before them or alone."""
    remark = "TAESD and TAESDXL have the same tensors; a spec beside the file says which."
    for name, axis in (
        ("decoder.layers.0.weight", 1),
        ("taesd_decoder.1.weight", 1),
        ("decoder.1.weight", 1),
        ("1.weight", 1),
    ):
        # The half alone: layer 1 reads the latents, and layer 3 is a block of three convolutions.
        block = name.replace("1.weight", "3.conv.0.weight").replace("0.weight", "2.conv.0.weight", name.count("layers"))
        if name in header and (block in header or "layers" in name) and len(header.shapes[name]) == 4:
            channels = header.side(name, axis)
            known = {4: ("sd15", "sd2", "sdxl"), 16: ("flux", "sd3")}
            if channels in known:
                remarks = (remark,) if channels == 4 else ()
                layout = "diffusers" if "layers" in name else "original"
                return FileIdentity(
                    Kind.TINY_VAE, known[channels], "taesd", layout=layout, in_channels=channels, remarks=remarks
                )
    return None


def find_text_encoder(header: TensorHeader) -> FileIdentity | None:
    """The text or image encoder in these tensors."""
    if (
        "vision_model.encoder.layers.0.mlp.fc1.weight" in header
        and "text_model.embeddings.token_embedding.weight" not in header
    ):
        variant = "clip-vision" if "vision_model.embeddings.class_embedding" in header else "siglip"
        return FileIdentity(Kind.IMAGE_ENCODER, variant=variant, layout="transformers")
    for prefix in ("", "text_model.", "clip_l.transformer.text_model."):
        if (
            f"{prefix}encoder.layers.0.mlp.fc1.weight" in header
            and f"{prefix}embeddings.token_embedding.weight" in header
        ):
            width = header.side(f"{prefix}embeddings.token_embedding.weight", 1)
            return _clip(width, "transformers", projects="text_projection.weight" in header)
    if "transformer.resblocks.0.mlp.c_fc.weight" in header and "token_embedding.weight" in header:
        return _clip(header.side("token_embedding.weight", 1), "open-clip", projects="text_projection" in header)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in header or "enc.blk.0.attn_q.weight" in header:
        return _t5(header)
    return _language_model(header)


def _clip(width: int, layout: str, *, projects: bool) -> FileIdentity:
    variant = {768: "clip-l", 1024: "clip-h", 1280: "clip-g"}.get(width, "")
    if not variant:
        reason = f"is a CLIP text encoder of width {width}, and 768, 1024 and 1280 are known"
        return FileIdentity(Kind.TEXT_ENCODER, layout=layout, reason=reason)
    return FileIdentity(Kind.TEXT_ENCODER, variant=variant, layout=layout, parts=("projection",) if projects else ())


def _t5(header: TensorHeader) -> FileIdentity:
    """T5, or UMT5, whose every block has a position bias of its own."""
    gguf = "enc.blk.0.attn_q.weight" in header
    bias = (
        "enc.blk.1.attn_rel_b.weight"
        if gguf
        else "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    )
    width = header.side("enc.blk.0.attn_q.weight" if gguf else "encoder.block.0.layer.0.SelfAttention.q.weight", 1)
    size = {4096: "xxl", 2048: "xl", 1024: "large", 768: "base", 512: "small"}.get(width, "")
    name = "umt5" if bias in header else "t5"
    layout = "gguf" if gguf else "transformers"
    if not size:
        return FileIdentity(
            Kind.TEXT_ENCODER, variant=name, layout=layout, reason=f"is a T5 of the unknown width {width}"
        )
    return FileIdentity(Kind.TEXT_ENCODER, variant=f"{name}-{size}", layout=layout)


def _language_model(header: TensorHeader) -> FileIdentity | None:
    """A language model that encodes prompts (Z-Image, FLUX.2, Qwen-Image, Lumina)."""
    for prefix in ("model.", "", "model.language_model.", "language_model.model."):
        if f"{prefix}layers.0.self_attn.q_proj.weight" in header and f"{prefix}embed_tokens.weight" in header:
            width = header.side(f"{prefix}embed_tokens.weight", 1)
            if f"{prefix}layers.0.pre_feedforward_layernorm.weight" in header:
                return FileIdentity(Kind.TEXT_ENCODER, variant=f"gemma-{width}", layout="transformers")
            if f"{prefix}layers.0.self_attn.q_norm.weight" in header:
                sizes = {1024: "qwen3-0.6b", 2560: "qwen3-4b", 4096: "qwen3-8b"}
                return FileIdentity(
                    Kind.TEXT_ENCODER, variant=sizes.get(width, f"qwen3-{width}"), layout="transformers"
                )
            if f"{prefix}layers.0.self_attn.q_proj.bias" in header:
                return FileIdentity(Kind.TEXT_ENCODER, variant=f"qwen2.5-{width}", layout="transformers")
            return FileIdentity(Kind.TEXT_ENCODER, variant=f"llama-{width}", layout="transformers")
    architecture = header.metadata.get("general.architecture", "")
    if "blk.0.attn_q.weight" in header and "token_embd.weight" in header and architecture:
        variant = f"{architecture[:20]}-{header.side('token_embd.weight', 1)}"
        return FileIdentity(Kind.TEXT_ENCODER, variant=variant, layout="gguf")
    return None


def find_embedding(header: TensorHeader) -> FileIdentity | None:
    """The textual inversion in these tensors."""
    sdxl = "clip_l" in header and "clip_g" in header
    if sdxl and len(header.shapes) <= 4 and len(header.shapes["clip_g"]) == 2:
        return FileIdentity(Kind.EMBEDDING, ("sdxl",), layout="original", parts=("clip_g", "clip_l"))
    if len(header.shapes) != 1:
        return None
    name, shape = next(iter(header.shapes.items()))
    if not shape or len(shape) > 2 or not (name == "emb_params" or (name[:1], name[-1:]) == ("<", ">")):
        return None
    families = {768: ("sd15",), 1024: ("sd2",), 1280: ("sdxl",)}.get(shape[-1], ())
    layout = "original" if name == "emb_params" else "diffusers"
    reason = "" if families else f"is an embedding of width {shape[-1]}, and 768, 1024 and 1280 are known"
    return FileIdentity(Kind.EMBEDDING, families, layout=layout, reason=reason)


def find_upscaler(header: TensorHeader) -> FileIdentity | None:
    """The upscaler in these tensors."""
    for prefix in _PREFIXES:
        for block, first, layout in _RRDB:
            if prefix + block in header and prefix + first in header:
                channels = header.side(prefix + first, 1)
                return FileIdentity(Kind.UPSCALER, variant="rrdb", layout=layout, in_channels=channels)
        for marks, variant in _OTHERS:
            if all(prefix + mark in header for mark in marks):
                return FileIdentity(Kind.UPSCALER, variant=variant, layout="original")
    return None
