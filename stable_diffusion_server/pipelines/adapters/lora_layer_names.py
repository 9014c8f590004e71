"""Names of layers in the models' original implementations, and ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Names = tuple[tuple[str, tuple[str, ...]], ...]

# The original models' names, and ours: of double blocks, of single blocks, of the rest.
_FLUX_DOUBLE: Names = (
    ("img_attn.qkv", _QKV), ("txt_attn.qkv", _ADDED), ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)), ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)), ("img_mlp.0", ("ff.net.0.proj",)), ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)), ("txt_mlp.2", ("ff_context.net.2",)),
    ("img_mlp.0", ("ff.linear_in",)), ("img_mlp.2", ("ff.linear_out",)),
    ("txt_mlp.0", ("ff_context.linear_in",)), ("txt_mlp.2", ("ff_context.linear_out",)),
)  # fmt: skip
_FLUX_SINGLE: Names = (
    ("linear1", (*_QKV, "proj_mlp")), ("linear2", ("proj_out",)), ("modulation.lin", ("norm.linear",)),
    ("qkv", _QKV), ("linear1", ("attn.to_qkv_mlp_proj",)), ("linear2", ("attn.to_out",)),
)  # fmt: skip
_TIMES = ("time_text_embed", "time_guidance_embed")
_FLUX_REST: Names = (
    ("img_in", ("x_embedder",)), ("txt_in", ("context_embedder",)), ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    *((f"{ours}_in.{half}_layer", (f"{embed}.{theirs}_embedder.linear_{number}",))
      for embed in _TIMES
      for ours, theirs in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
      for half, number in (("in", 1), ("out", 2))),
    *((f"{name}.lin", (f"{name}.linear",)) for name in
      ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")),
)  # fmt: skip
_SD3_BLOCK: Names = (
    ("x_block.attn.qkv", _QKV), ("context_block.attn.qkv", _ADDED), ("x_block.attn.proj", ("attn.to_out.0",)),
    ("context_block.attn.proj", ("attn.to_add_out",)), ("x_block.mlp.fc1", ("ff.net.0.proj",)),
    ("x_block.mlp.fc2", ("ff.net.2",)), ("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    ("context_block.mlp.fc2", ("ff_context.net.2",)), ("x_block.adaLN_modulation.1", ("norm1.linear",)),
    ("context_block.adaLN_modulation.1", ("norm1_context.linear",)),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")), ("x_block.attn2.proj", ("attn2.to_out.0",)),
)  # fmt: skip
_Z_IMAGE_BLOCK: Names = (
    ("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    ("attention.out", ("attention.to_out.0",)),
)
# Original name of a row of blocks, ours, and the names within a block.
_BLOCKS = (
    ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
    ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    ("joint_blocks", "transformer_blocks", _SD3_BLOCK),
    ("layers", "layers", _Z_IMAGE_BLOCK),
    ("noise_refiner", "noise_refiner", _Z_IMAGE_BLOCK),
    ("context_refiner", "context_refiner", _Z_IMAGE_BLOCK),
)
_RESNET = {
    "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"
}  # fmt: skip
_UNET_REST = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.2": "conv_out",
}  # fmt: skip


def aliases_of(denoiser: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The original model's name of a layer, and the paths of ours that it is, in the order of its rows."""
    if hasattr(denoiser, "down_blocks"):
        for theirs, ours in _unet_aliases(denoiser):
            yield theirs, (ours,)
        return
    yield from _FLUX_REST
    for theirs, ours, names in _BLOCKS:
        for number in range(len(getattr(denoiser, ours, ()))):
            for name, paths in names:
                yield f"{theirs}.{number}.{name}", tuple(f"{ours}.{number}.{path}" for path in paths)


def _unet_aliases(unet: Any) -> Iterator[tuple[str, str]]:
    """The names of Stability's implementation, which counts all blocks of a half in one row."""
    yield from _UNET_REST.items()
    for theirs, ours in _unet_blocks(unet):
        for path, layer in unet.get_submodule(ours).named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                inner = {value: key for key, value in _RESNET.items()}.get(path, path)
                yield f"{theirs}.{'op' if '.downsamplers.' in ours else inner}", f"{ours}.{path}"


def _unet_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    place = 1
    for number, block in enumerate(unet.down_blocks):
        for within in range(len(block.resnets)):
            yield f"input_blocks.{place}.0", f"down_blocks.{number}.resnets.{within}"
            if getattr(block, "attentions", None) is not None:
                yield f"input_blocks.{place}.1", f"down_blocks.{number}.attentions.{within}"
            place += 1
        if getattr(block, "downsamplers", None) is not None:
            yield f"input_blocks.{place}.0", f"down_blocks.{number}.downsamplers.0"
            place += 1
    yield from (("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1"))
    yield "middle_block.1", "mid_block.attentions.0"
    place = 0
    for number, block in enumerate(unet.up_blocks):
        for within in range(len(block.resnets)):
            yield f"output_blocks.{place}.0", f"up_blocks.{number}.resnets.{within}"
            attends = getattr(block, "attentions", None) is not None
            if attends:
                yield f"output_blocks.{place}.1", f"up_blocks.{number}.attentions.{within}"
            if within == len(block.resnets) - 1 and getattr(block, "upsamplers", None) is not None:
                yield f"output_blocks.{place}.{1 + attends}", f"up_blocks.{number}.upsamplers.0"
            place += 1
