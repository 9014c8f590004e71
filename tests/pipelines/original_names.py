"""The tensors of diffusers' networks under the names that downloaded files have.

The names are those of CompVis' SD 1.5, Stability's SDXL, Black Forest Labs' Flux, OpenCLIP and ComfyUI.
"""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _down_blocks(count: int) -> dict[str, str]:
    blocks = {
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for i in range(count):
        for j in range(2):
            blocks[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            blocks[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
        blocks[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
    return blocks


def _unet_blocks(unet: Any) -> dict[str, str]:
    count = len(unet.config.block_out_channels)
    blocks = _down_blocks(count)
    for i in range(count):
        for j in range(3):
            blocks[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            blocks[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        place = 2 if hasattr(unet.up_blocks[i], "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{3 * i + 2}.{place}."
    return blocks


def unet_tensors(unet: Any) -> Tensors:
    """A UNet in the names of Stability's code, without prefix."""
    return _renamed(unet.state_dict(), _unet_blocks(unet))


def _renamed(tensors: Tensors, blocks: dict[str, str]) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        head = next((old for old in _UNET if name.startswith(f"{old}.")), None)
        if head is not None:
            found[_UNET[head] + name[len(head) :]] = tensor
            continue
        old, new = next((old, new) for old, new in blocks.items() if name.startswith(old))
        rest = name[len(old) :]
        if "resnets" in old:
            part = next(part for part in _RESNET if rest.startswith(f"{part}."))
            rest = _RESNET[part] + rest[len(part) :]
        found[new + rest] = tensor
    return found


def vae_tensors(vae: Any) -> Tensors:
    """A VAE in the names of CompVis' code, without prefix."""
    found: Tensors = {}
    for name, tensor in vae.state_dict().items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        for i in range(4):
            new = new.replace(f"encoder.down_blocks.{i}.resnets.", f"encoder.down.{i}.block.")
            new = new.replace(f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample.")
            new = new.replace(f"decoder.up_blocks.{i}.resnets.", f"decoder.up.{3 - i}.block.")
            new = new.replace(f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{3 - i}.upsample.")
        new = new.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
        if "mid_block.attentions.0." in new:
            for old, short in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                new = new.replace(f"attentions.0.{old}.", f"attentions.0.{short}.")
            new = new.replace("to_out.0.", "proj_out.").replace("mid_block.attentions.0.", "mid.attn_1.")
            tensor = tensor.reshape(*tensor.shape, 1, 1) if tensor.ndim == 2 else tensor
        found[new] = tensor
    return found


def clip_tensors(encoder: Any) -> Tensors:
    """CLIP in the names of transformers before 5.6, which all files have."""
    names = {name: name if name.startswith("text_") else f"text_model.{name}" for name in encoder.state_dict()}
    return {names[name]: tensor for name, tensor in encoder.state_dict().items()}


def open_clip_tensors(encoder: Any) -> Tensors:
    """CLIP-G in OpenCLIP's names."""
    found: Tensors = {"logit_scale": torch.tensor(4.6)}
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in clip_tensors(encoder).items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
            continue
        new = name.removeprefix("text_model.")
        for old, short in (
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            new = new.replace(old, short)
        letter = next((letter for letter in "qkv" if f"self_attn.{letter}_proj." in new), None)
        if letter is None:
            found[new] = tensor
        else:
            fused.setdefault(new.replace(f"self_attn.{letter}_proj.", "attn.in_proj_"), {})[letter] = tensor
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}


def transformer_tensors(transformer: Any) -> Tensors:
    """A Flux transformer in the names of Black Forest Labs, without prefix."""
    state, found = transformer.state_dict(), {}
    config = transformer.config

    def move(new: str, old: str) -> None:
        found.update(
            {f"{new}.{leaf}": state[f"{old}.{leaf}"] for leaf in ("weight", "bias") if f"{old}.{leaf}" in state}
        )

    def fuse(new: str, *olds: str) -> None:
        found.update(
            {f"{new}.{leaf}": torch.cat([state[f"{old}.{leaf}"] for old in olds]) for leaf in ("weight", "bias")}
        )

    for new, old in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        move(f"{new}.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    for new, old in (("txt_in", "context_embedder"), ("img_in", "x_embedder"), ("final_layer.linear", "proj_out")):
        move(new, old)
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in range(config.num_layers):
        new, old = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for here, there in (
            ("img_mod.lin", "norm1.linear"),
            ("txt_mod.lin", "norm1_context.linear"),
            ("img_mlp.0", "ff.net.0.proj"),
            ("img_mlp.2", "ff.net.2"),
            ("txt_mlp.0", "ff_context.net.0.proj"),
            ("txt_mlp.2", "ff_context.net.2"),
            ("img_attn.proj", "attn.to_out.0"),
            ("txt_attn.proj", "attn.to_add_out"),
        ):
            move(f"{new}.{here}", f"{old}.{there}")
        fuse(f"{new}.img_attn.qkv", *(f"{old}.attn.to_{letter}" for letter in "qkv"))
        fuse(f"{new}.txt_attn.qkv", *(f"{old}.attn.add_{letter}_proj" for letter in "qkv"))
        for here, there in (("img", "norm_"), ("txt", "norm_added_")):
            for long, short in (("query", "q"), ("key", "k")):
                found[f"{new}.{here}_attn.norm.{long}_norm.scale"] = state[f"{old}.attn.{there}{short}.weight"]
    for i in range(config.num_single_layers):
        new, old = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear2", f"{old}.proj_out")
        fuse(f"{new}.linear1", *(f"{old}.attn.to_{letter}" for letter in "qkv"), f"{old}.proj_mlp")
        for long, short in (("query", "q"), ("key", "k")):
            found[f"{new}.norm.{long}_norm.scale"] = state[f"{old}.attn.norm_{short}.weight"]
    return found


def xlabs_tensors(network: Any) -> Tensors:
    """A Flux ControlNet with a hint block in the names of XLabs."""
    state = dict(network.state_dict())
    hint = ["conv_in", *(f"blocks.{number}" for number in range(6)), "conv_out"]
    beside = {f"input_hint_block.{old}": str(2 * n) for n, old in enumerate(hint)}

    class WithFinalLayer:
        """What `transformer_tensors` reads, with a last layer that is left out again."""

        config = network.config

        def state_dict(self) -> dict[str, torch.Tensor]:
            side = network.config.num_attention_heads * network.config.attention_head_dim
            last = {f"norm_out.linear.{leaf}": torch.zeros(2 * side) for leaf in ("weight", "bias")}
            return {**state, **last}

    found = {
        name: tensor for name, tensor in transformer_tensors(WithFinalLayer()).items() if "final_layer" not in name
    }
    for name, tensor in state.items():
        part, _, leaf = name.rpartition(".")
        if name.startswith("controlnet_blocks."):
            found[name] = tensor
        elif part == "controlnet_x_embedder":
            found[f"pos_embed_input.{leaf}"] = tensor
        elif part in beside:
            found[f"input_hint_block.{beside[part]}.{leaf}"] = tensor
    return found


def t5_tensors(encoder: Any) -> Tensors:
    """T5's encoder in the names of transformers; ComfyUI's files hold the table of words once."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}


def sdxl_tensors(pipeline: Any) -> Tensors:
    """A whole SDXL checkpoint."""
    return {
        **_under("model.diffusion_model.", unet_tensors(pipeline.unet)),
        **_under("first_stage_model.", vae_tensors(pipeline.vae)),
        **_under("conditioner.embedders.0.transformer.", clip_tensors(pipeline.text_encoder)),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        **_under("conditioner.embedders.1.model.", open_clip_tensors(pipeline.text_encoder_2)),
    }


def sd15_tensors(pipeline: Any) -> Tensors:
    """A whole checkpoint of SD 1.5, with what training leaves in it."""
    return {
        **_under("model.diffusion_model.", unet_tensors(pipeline.unet)),
        **_under("first_stage_model.", vae_tensors(pipeline.vae)),
        **_under("cond_stage_model.transformer.", clip_tensors(pipeline.text_encoder)),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }


def flux_tensors(pipeline: Any) -> Tensors:
    """A whole Flux checkpoint, as ComfyUI packs it."""
    return {
        **_under("model.diffusion_model.", transformer_tensors(pipeline.transformer)),
        **_under("vae.", vae_tensors(pipeline.vae)),
        **_under("text_encoders.clip_l.transformer.", clip_tensors(pipeline.text_encoder)),
        **_under("text_encoders.t5xxl.transformer.", t5_tensors(pipeline.text_encoder_2)),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
    }


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def controlnet_tensors(network: Any) -> Tensors:
    """A ControlNet of two layers in each block in the names of its authors' code, without prefix."""
    ends = {"controlnet_cond_embedding.conv_in.": "input_hint_block.0."}
    pairs = 2 * (len(network.config.conditioning_embedding_out_channels) - 1)
    ends |= {f"controlnet_cond_embedding.blocks.{i}.": f"input_hint_block.{2 * i + 2}." for i in range(pairs)}
    ends["controlnet_cond_embedding.conv_out."] = f"input_hint_block.{2 * pairs + 2}."
    ends |= {f"controlnet_down_blocks.{i}.": f"zero_convs.{i}.0." for i in range(len(network.controlnet_down_blocks))}
    ends["controlnet_mid_block."] = "middle_block_out.0."
    named = {name: next((new + name[len(old) :] for old, new in ends.items() if name.startswith(old)), "")
             for name in network.state_dict()}  # fmt: skip
    halves = {name: tensor for name, tensor in network.state_dict().items() if not named[name]}
    return _renamed(halves, _down_blocks(len(network.config.block_out_channels))) | {
        named[name]: tensor for name, tensor in network.state_dict().items() if named[name]
    }
