"""Model files with the original tensor names and shapes, as their authors, trainers and other programs write them.

Weights are holes in sparse files, so that a file of full size takes a few kilobytes on disk. Run it to write one file
of each kind into a folder: `python tests/pipelines/model_files.py FOLDER`.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I64": 8}
GGUF_TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144),
              "IQ3_S": (21, 256, 110), "BF16": (30, 1, 2)}  # fmt: skip


def header_bytes(
    shapes: Shapes,
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> tuple[bytes, int]:
    """A safetensors header with its length in front, and the bytes of tensors that it describes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, dtype)
        size = prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def write_safetensors(
    file: Path,
    shapes: Shapes,
    dtype: str = "F16",
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Write a sparse safetensors file."""
    text, size = header_bytes(shapes, dtype, metadata, dtypes)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as target:
        target.write(text)
        target.truncate(len(text) + size)
    return file


def write_gguf(
    file: Path, shapes: Shapes, quantized: str = "Q8_0", architecture: str = "flux", vocabulary: int = 0
) -> Path:
    """Write a sparse GGUF file: matrices whose rows can be are `quantized`, the rest is F32."""
    entries = [_text("general.architecture") + struct.pack("<I", 8) + _text(architecture)]
    if vocabulary:
        words = b"".join(_text(f"word{number}") for number in range(vocabulary))
        entries.append(_text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, vocabulary) + words)
    infos, offset = [], 0
    for name, shape in shapes.items():
        fits = len(shape) == 2 and shape[1] % GGUF_TYPES[quantized][1] == 0
        number, block, size = GGUF_TYPES[quantized if fits else "F32"]
        sides = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(_text(name) + sides + struct.pack("<IQ", number, offset))
        offset += -(-prod(shape) // block * size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries)) + b"".join(entries) + b"".join(infos)
    head += bytes(-len(head) % 32)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as target:
        target.write(head)
        target.truncate(len(head) + offset)
    return file


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    """The same tensors with a prefix before their names."""
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, into: int, out: int, *, bias: bool = True) -> Shapes:
    """A linear layer."""
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, into: int, out: int, side: int = 3) -> Shapes:
    """A convolution."""
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    """A normalisation with weight and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# --- Stable Diffusion


def ldm_unet(
    kind: str = "sdxl", in_channels: int = 4, width: int = 320, context: int | None = None, *, controlnet: bool = False
) -> Shapes:
    """A UNet of SD 1 (`sd15`), SD 2 (`sd2`), SDXL (`sdxl`) or the SDXL refiner (`refiner`), in the authors' names."""
    levels, depths, base, texts = {
        "sd15": ((1, 2, 4, 4), (1, 1, 1, 0), 320, 768),
        "sd2": ((1, 2, 4, 4), (1, 1, 1, 0), 320, 1024),
        "sdxl": ((1, 2, 4), (0, 2, 10), 320, 2048),
        "refiner": ((1, 2, 4, 4), (0, 4, 4, 0), 384, 1280),
    }[kind]
    width, texts = (base if width == 320 else width), context or texts
    embedded = 4 * width
    found = linear("time_embed.0", width, embedded) | linear("time_embed.2", embedded, embedded)
    if kind in ("sdxl", "refiner"):
        added = {"sdxl": 2816, "refiner": 2560}[kind]
        found |= linear("label_emb.0.0", added, embedded) | linear("label_emb.0.2", embedded, embedded)
    found |= conv("input_blocks.0.0", in_channels, width)
    projected = kind != "sd15"
    stack, now, block = [width], width, 1
    for level, (factor, depth) in enumerate(zip(levels, depths, strict=True)):
        for _ in range(2):
            found |= _resnet(f"input_blocks.{block}.0", now, width * factor, embedded)
            now = width * factor
            if depth:
                found |= _attention(f"input_blocks.{block}.1", now, texts, depth, linear_projection=projected)
            stack.append(now)
            block += 1
        if level < len(levels) - 1:
            found |= conv(f"input_blocks.{block}.0.op", now, now)
            stack.append(now)
            block += 1
    middle = {"sdxl": 10, "refiner": 4}.get(kind, 1)
    found |= _resnet("middle_block.0", now, now, embedded) | _resnet("middle_block.2", now, now, embedded)
    found |= _attention("middle_block.1", now, texts, middle, linear_projection=projected)
    if controlnet:
        return found | _control_ends(stack, now)
    block = 0
    for level in reversed(range(len(levels))):
        for number in range(3):
            found |= _resnet(f"output_blocks.{block}.0", now + stack.pop(), width * levels[level], embedded)
            now, inner = width * levels[level], 1
            if depths[level]:
                found |= _attention(f"output_blocks.{block}.1", now, texts, depths[level], linear_projection=projected)
                inner = 2
            if level and number == 2:
                found |= conv(f"output_blocks.{block}.{inner}.conv", now, now)
            block += 1
    return found | norm("out.0", width) | conv("out.2", width, 4)


def _resnet(name: str, into: int, out: int, embedded: int) -> Shapes:
    found = norm(f"{name}.in_layers.0", into) | conv(f"{name}.in_layers.2", into, out)
    found |= linear(f"{name}.emb_layers.1", embedded, out)
    found |= norm(f"{name}.out_layers.0", out) | conv(f"{name}.out_layers.3", out, out)
    return found | (conv(f"{name}.skip_connection", into, out, 1) if into != out else {})


def _attention(name: str, width: int, texts: int, depth: int, *, linear_projection: bool) -> Shapes:
    found = norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        found |= linear(f"{name}.{end}", width, width) if linear_projection else conv(f"{name}.{end}", width, width, 1)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, source in (("attn1", width), ("attn2", texts)):
            found |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
            found |= linear(f"{block}.{attention}.to_k", source, width, bias=False)
            found |= linear(f"{block}.{attention}.to_v", source, width, bias=False)
            found |= linear(f"{block}.{attention}.to_out.0", width, width)
        found |= linear(f"{block}.ff.net.0.proj", width, 8 * width) | linear(f"{block}.ff.net.2", 4 * width, width)
        for layer in ("norm1", "norm2", "norm3"):
            found |= norm(f"{block}.{layer}", width)
    return found


def _control_ends(stack: list[int], now: int) -> Shapes:
    """What a ControlNet has beside the first half of a UNet."""
    found: Shapes = {}
    for number, (into, out) in enumerate(((3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256))):
        found |= conv(f"input_hint_block.{2 * number}", into, out)
    found |= conv("input_hint_block.14", 256, stack[0])
    for number, width in enumerate(stack):
        found |= conv(f"zero_convs.{number}.0", width, width, 1)
    return found | conv("middle_block_out.0", now, now, 1)


def ldm_vae(latents: int = 4, base: int = 128, *, quantizers: bool = True) -> Shapes:
    """A VAE in the authors' names."""
    widths = (base, 2 * base, 4 * base, 4 * base)
    found: Shapes = {}
    for half in ("encoder", "decoder"):
        decodes = half == "decoder"
        found |= conv(f"{half}.conv_in", latents if decodes else 3, widths[-1] if decodes else base)
        found |= conv(f"{half}.conv_out", base if decodes else widths[-1], 3 if decodes else 2 * latents)
        found |= norm(f"{half}.norm_out", base if decodes else widths[-1])
        for block in ("block_1", "block_2"):
            found |= _vae_resnet(f"{half}.mid.{block}", widths[-1], widths[-1])
        found |= norm(f"{half}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            found |= conv(f"{half}.mid.attn_1.{part}", widths[-1], widths[-1], 1)
        now = widths[-1] if decodes else base
        for level in reversed(range(4)) if decodes else range(4):
            name = f"{half}.{'up' if decodes else 'down'}.{level}"
            for number in range(3 if decodes else 2):
                found |= _vae_resnet(f"{name}.block.{number}", now, widths[level])
                now = widths[level]
            if level != (0 if decodes else 3):
                found |= conv(f"{name}.{'upsample' if decodes else 'downsample'}.conv", now, now)
    if quantizers:
        found |= conv("quant_conv", 2 * latents, 2 * latents, 1) | conv("post_quant_conv", latents, latents, 1)
    return found


def _vae_resnet(name: str, into: int, out: int) -> Shapes:
    found = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", into, out)
    found |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out)
    return found | (conv(f"{name}.nin_shortcut", into, out, 1) if into != out else {})


def clip(width: int = 768, layers: int = 12, *, projection: bool = False) -> Shapes:
    """A CLIP text encoder in the names of transformers (ComfyUI's clip_l.safetensors)."""
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for number in range(layers):
        layer = f"text_model.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}.self_attn.{part}", width, width)
        found |= linear(f"{layer}.mlp.fc1", width, 4 * width) | linear(f"{layer}.mlp.fc2", 4 * width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    found |= norm("text_model.final_layer_norm", width)
    return found | (linear("text_projection", width, width, bias=False) if projection else {})


def open_clip(width: int = 1280, layers: int = 32) -> Shapes:
    """A CLIP text encoder in OpenCLIP's names, as checkpoints hold it."""
    found: Shapes = {
        "token_embedding.weight": (49408, width), "positional_embedding": (77, width),
        "text_projection": (width, width), "logit_scale": (),
    }  # fmt: skip
    for number in range(layers):
        layer = f"transformer.resblocks.{number}"
        found |= {f"{layer}.attn.in_proj_weight": (3 * width, width), f"{layer}.attn.in_proj_bias": (3 * width,)}
        found |= linear(f"{layer}.attn.out_proj", width, width)
        found |= linear(f"{layer}.mlp.c_fc", width, 4 * width) | linear(f"{layer}.mlp.c_proj", 4 * width, width)
        found |= norm(f"{layer}.ln_1", width) | norm(f"{layer}.ln_2", width)
    return found | norm("ln_final", width)


def t5(width: int = 4096, layers: int = 24, *, every_bias: bool = False) -> Shapes:
    """A T5 encoder in the names of transformers (t5xxl_fp16.safetensors); UMT5 has a bias in every block."""
    found: Shapes = {"shared.weight": (32128, width), "encoder.final_layer_norm.weight": (width,)}
    for number in range(layers):
        block = f"encoder.block.{number}.layer"
        for part in "qkvo":
            found |= linear(f"{block}.0.SelfAttention.{part}", width, width, bias=False)
        if every_bias or not number:
            found[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        found |= {f"{block}.0.layer_norm.weight": (width,), f"{block}.1.layer_norm.weight": (width,)}
        for part, sides in (("wi_0", (10240, width)), ("wi_1", (10240, width)), ("wo", (width, 10240))):
            found[f"{block}.1.DenseReluDense.{part}.weight"] = sides
    return found


def qwen3(width: int = 2560, layers: int = 36) -> Shapes:
    """Qwen3, the text encoder of Z-Image and FLUX.2 klein."""
    found: Shapes = {"model.embed_tokens.weight": (151936, width), "model.norm.weight": (width,)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found |= linear(f"{layer}.self_attn.{part}", width, width, bias=False)
        found |= {f"{layer}.self_attn.q_norm.weight": (128,), f"{layer}.input_layernorm.weight": (width,)}
    return found


def sdxl_checkpoint(in_channels: int = 4, markers: tuple[str, ...] = ()) -> Shapes:
    """An SDXL checkpoint: UNet, VAE and both text encoders."""
    found = prefixed("model.diffusion_model.", ldm_unet("sdxl", in_channels))
    found |= prefixed("first_stage_model.", ldm_vae())
    found |= prefixed("conditioner.embedders.0.transformer.", clip())
    found |= prefixed("conditioner.embedders.1.model.", open_clip())
    return found | dict.fromkeys(markers, ())


def sd_checkpoint(kind: str = "sd15", in_channels: int = 4) -> Shapes:
    """A checkpoint of SD 1 or SD 2."""
    found = prefixed("model.diffusion_model.", ldm_unet(kind, in_channels))
    found |= prefixed("first_stage_model.", ldm_vae())
    if kind == "sd15":
        return found | prefixed("cond_stage_model.transformer.", clip())
    return found | prefixed("cond_stage_model.model.", open_clip(1024, 24))


def refiner_checkpoint() -> Shapes:
    """The SDXL refiner."""
    found = prefixed("model.diffusion_model.", ldm_unet("refiner"))
    found |= prefixed("first_stage_model.", ldm_vae())
    return found | prefixed("conditioner.embedders.0.model.", open_clip())


# --- Transformers


def flux(
    in_channels: int = 64, *, guidance: bool = True, double: int = 19, single: int = 38, width: int = 3072
) -> Shapes:
    """Flux.1 in Black Forest Labs' names."""
    found = linear("img_in", in_channels, width) | linear("txt_in", 4096, width)
    for name, into in (("time_in", 256), ("vector_in", 768), *((("guidance_in", 256),) if guidance else ())):
        found |= linear(f"{name}.in_layer", into, width) | linear(f"{name}.out_layer", width, width)
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            found |= linear(f"{block}_mod.lin", width, 6 * width) | linear(f"{block}_attn.qkv", width, 3 * width)
            found |= linear(f"{block}_attn.proj", width, width)
            found |= {f"{block}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
            found |= linear(f"{block}_mlp.0", width, 4 * width) | linear(f"{block}_mlp.2", 4 * width, width)
    for number in range(single):
        block = f"single_blocks.{number}"
        found |= linear(f"{block}.linear1", width, 7 * width) | linear(f"{block}.linear2", 5 * width, width)
        found |= linear(f"{block}.modulation.lin", width, 3 * width)
        found |= {f"{block}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    return found | linear("final_layer.linear", width, 64) | linear("final_layer.adaLN_modulation.1", width, 2 * width)


def flux_checkpoint() -> Shapes:
    """Flux.1 schnell with everything in one file, as ComfyUI publishes it."""
    found = prefixed("model.diffusion_model.", flux(guidance=False))
    found |= prefixed("text_encoders.clip_l.transformer.", clip())
    found |= prefixed("text_encoders.t5xxl.transformer.", t5())
    return found | prefixed("vae.", ldm_vae(16, quantizers=False))


def flux2(width: int = 3072, texts: int = 7680, double: int = 5, single: int = 20, *, guidance: bool = False) -> Shapes:
    """FLUX.2 in Black Forest Labs' names; by default klein 4B."""
    found = linear("img_in", 128, width, bias=False) | linear("txt_in", texts, width, bias=False)
    for name in ("time_in", *(("guidance_in",) if guidance else ())):
        found |= linear(f"{name}.in_layer", 256, width, bias=False)
        found |= linear(f"{name}.out_layer", width, width, bias=False)
    for name, factor in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        found |= linear(f"{name}.lin", width, factor * width, bias=False)
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            found |= linear(f"{block}_attn.qkv", width, 3 * width, bias=False)
            found |= linear(f"{block}_attn.proj", width, width, bias=False)
            found |= {f"{block}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
            found |= linear(f"{block}_mlp.0", width, 6 * width, bias=False)
            found |= linear(f"{block}_mlp.2", 3 * width, width, bias=False)
    for number in range(single):
        block = f"single_blocks.{number}"
        found |= linear(f"{block}.linear1", width, 9 * width, bias=False)
        found |= linear(f"{block}.linear2", 4 * width, width, bias=False)
        found |= {f"{block}.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    found |= linear("final_layer.linear", width, 128, bias=False)
    return found | linear("final_layer.adaLN_modulation.1", width, 2 * width, bias=False)


def z_image(width: int = 3840, layers: int = 30) -> Shapes:
    """Z-Image in its authors' names."""
    found = linear("x_embedder", 64, width) | linear("cap_embedder.1", 2560, width) | {"cap_embedder.0.weight": (2560,)}
    found |= linear("t_embedder.mlp.0", 256, 1024) | linear("t_embedder.mlp.2", 1024, 256)
    found |= {"x_pad_token": (1, width), "cap_pad_token": (1, width)}
    for group, count in (("layers", layers), ("noise_refiner", 2), ("context_refiner", 2)):
        for number in range(count):
            block = f"{group}.{number}"
            found |= linear(f"{block}.attention.qkv", width, 3 * width, bias=False)
            found |= linear(f"{block}.attention.out", width, width, bias=False)
            found |= {f"{block}.attention.{part}_norm.weight": (128,) for part in "qk"}
            found |= {f"{block}.feed_forward.{part}.weight": (10240, width) for part in ("w1", "w3")}
            found |= {f"{block}.feed_forward.w2.weight": (width, 10240)}
            norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
            found |= {f"{block}.{part}.weight": (width,) for part in norms}
            if group != "context_refiner":
                found |= linear(f"{block}.adaLN_modulation.0", 256, 4 * width)
    return found | linear("final_layer.linear", width, 64) | linear("final_layer.adaLN_modulation.1", 256, width)


def sd3(blocks: int = 38, width: int = 2432, *, dual: bool = False) -> Shapes:
    """SD 3 and 3.5 in their authors' names; by default 3.5 large."""
    found = conv("x_embedder.proj", 16, width, 2) | {"pos_embed": (1, 36864, width)}
    found |= linear("context_embedder", 4096, width)
    for number in range(blocks):
        for stream in ("context_block", "x_block"):
            block = f"joint_blocks.{number}.{stream}"
            found |= linear(f"{block}.adaLN_modulation.1", width, 6 * width) | linear(
                f"{block}.attn.qkv", width, 3 * width
            )
            found |= linear(f"{block}.mlp.fc1", width, 4 * width)
            if dual and stream == "x_block":
                found |= linear(f"{block}.attn2.qkv", width, 3 * width)
    return found


def qwen_image(width: int = 3072, blocks: int = 60) -> Shapes:
    """Qwen-Image, whose authors use diffusers' names."""
    found = linear("img_in", 64, width) | linear("txt_in", 3584, width) | {"txt_norm.weight": (3584,)}
    for number in range(blocks):
        block = f"transformer_blocks.{number}"
        found |= linear(f"{block}.img_mod.1", width, 6 * width) | linear(f"{block}.txt_mod.1", width, 6 * width)
        found |= linear(f"{block}.attn.to_q", width, width) | linear(f"{block}.attn.add_q_proj", width, width)
        found |= linear(f"{block}.img_mlp.net.0.proj", width, 4 * width)
    return found


MARKS: dict[str, Shapes] = {
    "chroma": {"distilled_guidance_layer.in_proj.bias": (5120,), "img_in.weight": (3072, 64)},
    "krea2": {"txtfusion.projector.weight": (12, 2560), "first.weight": (6144, 64)},
    "wan": {"head.modulation": (1, 2, 5120), "patch_embedding.weight": (5120, 16, 1, 2, 2)},
    "pixart": {"blocks.0.cross_attn.q_linear.weight": (1152, 1152), "blocks.0.mlp.fc1.weight": (4608, 1152)},
    "sana": {"blocks.0.cross_attn.q_linear.weight": (9, 9), "blocks.0.mlp.inverted_conv.conv.weight": (9, 9, 1, 1)},
    "auraflow": {"double_layers.0.attn.w1q.weight": (3072, 3072)},
    "lumina2": {"layers.0.adaLN_modulation.1.weight": (9216, 1024), "cap_embedder.0.weight": (2304,)},
    "hidream": {"double_stream_blocks.0.block.adaLN_modulation.1.bias": (30720,)},
    "anima": {"net.x_embedder.proj.1.weight": (2048, 68), "net.llm_adapter.blocks.0.weight": (1024, 1024)},
    "hunyuan-video": {"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (6144,)},
    "flux3": {"early_stream_modulations.image.lin.weight": (18432, 3072)},
    "stable-cascade": {"clip_txt_mapper.weight": (2048, 1280)},
}  # fmt: skip


def diffusers_unet() -> Shapes:
    """The names that tell an SDXL UNet in diffusers' layout."""
    found = conv("conv_in", 4, 320) | conv("conv_out", 320, 4) | linear("time_embedding.linear_1", 320, 1280)
    found |= linear("add_embedding.linear_1", 2816, 1280)
    attention = "down_blocks.1.attentions.0.transformer_blocks"
    return found | {f"{attention}.{depth}.attn2.to_k.weight": (640, 2048) for depth in (0, 1)}


def diffusers_flux() -> Shapes:
    """The names that tell a Flux dev transformer in diffusers' layout."""
    found = linear("x_embedder", 64, 3072) | linear("context_embedder", 4096, 3072)
    for part in ("timestep_embedder", "guidance_embedder"):
        found |= linear(f"time_text_embed.{part}.linear_1", 256, 3072)
    return found | linear("single_transformer_blocks.0.attn.to_q", 3072, 3072)


# --- Adapters


def kohya(layers: Mapping[str, tuple[int, int]], rank: int = 16) -> Shapes:
    """A LoRA as kohya's scripts write it; layers are name → (input, output)."""
    found: Shapes = {}
    for name, (into, out) in layers.items():
        found |= {f"{name}.lora_down.weight": (rank, into), f"{name}.lora_up.weight": (out, rank), f"{name}.alpha": ()}
    return found


def peft(layers: Mapping[str, tuple[int, int]], rank: int = 16) -> Shapes:
    """A LoRA as PEFT writes it."""
    return {
        f"{name}.lora_{half}.weight": (rank, into) if half == "A" else (out, rank)
        for name, (into, out) in layers.items()
        for half in "AB"
    }


SDXL_LAYERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (2048, 640),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (2048, 640),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (768, 3072),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (1280, 5120),
}
SD15_LAYERS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (768, 320),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (768, 3072),
}
FLUX_LAYERS = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3072, 9216),
    "lora_unet_single_blocks_0_linear1": (3072, 21504),
}
KLEIN_LAYERS = {"diffusion_model.single_blocks.0.linear1": (3072, 27648)}
AI_TOOLKIT_LAYERS = {
    "transformer.transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer.single_transformer_blocks.0.proj_mlp": (3072, 12288),
}
_Q = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
LOHA: Shapes = {f"{_Q}.hada_w{n}_{h}": (640, 4) if h == "a" else (4, 2048) for n in (1, 2) for h in "ab"}
LOKR: Shapes = {f"{_Q}.lokr_w1": (8, 8), f"{_Q}.lokr_w2": (80, 256), f"{_Q}.alpha": ()}
DORA: Shapes = kohya({_Q: (2048, 640)}) | {f"{_Q}.dora_scale": (640, 1)}
LOCON: Shapes = kohya(SDXL_LAYERS) | {
    "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": (16, 320, 3, 3),
    "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": (320, 16, 1, 1),
}
OLD_PROCESSOR: Shapes = {
    f"unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.processor.to_k_lora.{half}.weight": shape
    for half, shape in (("down", (4, 2048)), ("up", (640, 4)))
}
XLABS: Shapes = {
    f"double_blocks.0.processor.qkv_lora1.{half}.weight": shape
    for half, shape in (("down", (16, 3072)), ("up", (9216, 16)))
}
FLUX_CONTROL_LORA: Shapes = peft({"img_in": (128, 3072), "double_blocks.0.img_attn.qkv": (3072, 9216)}) | {
    "double_blocks.0.img_attn.norm.query_norm.scale": (128,)
}
SAI_CONTROL_LORA: Shapes = {
    "lora_controlnet": (), "input_hint_block.0.weight": (16, 3, 3, 3), "label_emb.0.0.up": (1280, 128),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.up": (640, 128),
}  # fmt: skip

DIFFUSERS_CONTROLNET: Shapes = (
    conv("conv_in", 4, 320)
    | conv("controlnet_cond_embedding.conv_in", 3, 16)
    | linear("add_embedding.linear_1", 2816, 1280)
)
UNION_CONTROLNET: Shapes = DIFFUSERS_CONTROLNET | {"task_embedding": (6, 320)}
FLUX_CONTROLNET: Shapes = (
    linear("controlnet_x_embedder", 64, 3072)
    | linear("controlnet_blocks.0", 3072, 3072)
    | linear("x_embedder", 64, 3072)
    | linear("context_embedder", 4096, 3072)
    | linear("time_text_embed.timestep_embedder.linear_1", 256, 3072)
)
FLUX_UNION: Shapes = FLUX_CONTROLNET | {"controlnet_mode_embedder.weight": (10, 3072)}
IP_ADAPTER: Shapes = {"image_proj.proj.weight": (8192, 1280), "ip_adapter.1.to_k_ip.weight": (640, 2048)}
IP_ADAPTER_PLUS: Shapes = {"image_proj.latents": (1, 16, 1280), "ip_adapter.1.to_k_ip.weight": (320, 768)}
REDUX: Shapes = linear("redux_up", 1152, 12288) | linear("redux_down", 12288, 4096)
TAESD: Shapes = {"taesd_decoder.1.weight": (64, 4, 3, 3), "taesd_decoder.3.conv.0.weight": (64, 64, 3, 3)}
TAESD_HALF: Shapes = {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}
TAESD_DIFFUSERS: Shapes = {"decoder.layers.0.weight": (64, 4, 3, 3), "encoder.layers.0.weight": (64, 3, 3, 3)}
ESRGAN_OLD: Shapes = {"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}
ESRGAN_NEW: Shapes = {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 64, 3, 3)}
CLIP_VISION: Shapes = {
    "vision_model.encoder.layers.0.mlp.fc1.weight": (5120, 1280), "vision_model.embeddings.class_embedding": (1280,),
}  # fmt: skip
SCALED = {"double_blocks.0.img_attn.qkv.scale_weight": (), "scaled_fp8": (0,)}

# Name → tensors, of files without peculiarities.
FILES: dict[str, Shapes] = {
    "sdxl": sdxl_checkpoint(),
    "sdxl-inpaint": sdxl_checkpoint(9),
    "sdxl-vpred": sdxl_checkpoint(markers=("v_pred", "ztsnr")),
    "sdxl-unet": ldm_unet("sdxl"),
    "sdxl-refiner": refiner_checkpoint(),
    "playground": sdxl_checkpoint(markers=("edm_mean", "edm_std")),
    "sd15": sd_checkpoint("sd15"),
    "sd15-inpaint": sd_checkpoint("sd15", 9),
    "sd15-pix2pix": sd_checkpoint("sd15", 8),
    "sd2": sd_checkpoint("sd2"),
    "flux-all": flux_checkpoint(),
    "flux-schnell": flux(guidance=False),
    "flux-dev": flux(),
    "flux-dev-comfy": prefixed("model.diffusion_model.", flux()),
    "flux-fill": flux(384),
    "flux-canny": flux(128),
    "klein-4b": flux2(),
    "klein-9b": flux2(4096, 12288, 8, 24),
    "flux2-dev": flux2(6144, 15360, 8, 48, guidance=True),
    "z-image": z_image(),
    "sd35-large": sd3(),
    "sd35-medium": sd3(24, 1536, dual=True),
    "qwen-image": qwen_image(),
    "sdxl-unet-diffusers": diffusers_unet(),
    "flux-diffusers": diffusers_flux(),
    "vae-sd": ldm_vae(),
    "vae-flux": ldm_vae(16, quantizers=False),
    "vae-flux2": ldm_vae(32) | {"bn.running_mean": (128,)},
    "taesd": TAESD,
    "taesd-half": TAESD_HALF,
    "taesd-diffusers": TAESD_DIFFUSERS,
    "clip-l": clip(),
    "clip-g": clip(1280, 32, projection=True),
    "open-clip-g": open_clip(),
    "t5xxl": t5(),
    "umt5": t5(every_bias=True),
    "qwen3": qwen3(),
    "clip-vision": CLIP_VISION,
    "lora-sdxl": kohya(SDXL_LAYERS),
    "lora-sd15": kohya(SD15_LAYERS),
    "lora-flux": kohya(FLUX_LAYERS),
    "lora-klein": peft(KLEIN_LAYERS),
    "lora-ai-toolkit": peft(AI_TOOLKIT_LAYERS),
    "lora-old": OLD_PROCESSOR,
    "lora-xlabs": XLABS,
    "locon": LOCON,
    "loha": LOHA,
    "lokr": LOKR,
    "dora": DORA,
    "embedding-sd15": {"emb_params": (8, 768)},
    "embedding-sdxl": {"clip_l": (8, 768), "clip_g": (8, 1280)},
    "embedding-diffusers": {"<cat>": (768,)},
    "controlnet-sd15": prefixed("control_model.", ldm_unet("sd15", controlnet=True)),
    "controlnet-sdxl": prefixed("control_model.", ldm_unet("sdxl", controlnet=True)),
    "controlnet-diffusers": DIFFUSERS_CONTROLNET,
    "controlnet-union": UNION_CONTROLNET,
    "controlnet-flux": FLUX_CONTROLNET,
    "controlnet-flux-union": FLUX_UNION,
    "control-lora": SAI_CONTROL_LORA,
    "control-lora-flux": FLUX_CONTROL_LORA,
    "ip-adapter": IP_ADAPTER,
    "ip-adapter-plus": IP_ADAPTER_PLUS,
    "redux": REDUX,
    "esrgan": ESRGAN_OLD,
    "real-esrgan": ESRGAN_NEW,
    **MARKS,
}


def main() -> None:
    """Write one file of each kind into the folder of the first argument."""
    for name, shapes in FILES.items():
        write_safetensors(Path(sys.argv[1], f"{name}.safetensors"), shapes)
    write_gguf(Path(sys.argv[1], "flux-q8.gguf"), flux(double=1, single=1))


if __name__ == "__main__":
    main()
