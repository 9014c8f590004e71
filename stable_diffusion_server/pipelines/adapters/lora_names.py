"""Reads the tensor names of LoRA files: which component, which layer by the trainer's name, and which tensor of it."""

from __future__ import annotations

import re
from typing import NamedTuple

DENOISER, CLIP_G, T5 = "denoiser", "clip_g", "t5"
# What trainers write before the name of a layer, and the component they mean; the first match counts.
_PREFIXES = (
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", CLIP_G),
    ("text_encoders.t5xxl.transformer.", T5),
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("lycoris_", DENOISER),
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
)
_WRAPPED = "base_model.model."
_ENDING = re.compile(
    r"\.(?:lora_|lora\.|lora_linear_layer\.)?(?P<half>down|up|mid|A|B)(?:\.(?!weight|bias)\w+)?(?P<what>\.weight|\.bias)?$"
    r"|_lora(?P<stream>[12]?)\.(?P<old>down|up)\.weight$"
    r"|\.(?P<plain>alpha|dora_scale|scalar|diff|diff_b|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)$"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.(?!weight)\w+)?(?:\.weight)?$"
)
_HALVES = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"}
_LORA = re.compile(r"lora|lokr|hada|\.alpha$|dora_scale|\.diff(_b)?$")
# Layers of XLabs' processors, by the name and the number of the stream, and the layer of the original model.
_XLABS = {"qkv1": "img_attn.qkv", "qkv2": "txt_attn.qkv", "proj1": "img_attn.proj", "proj2": "txt_attn.proj"}


class TensorName(NamedTuple):
    """What a tensor is for: `component` of the pipeline, `layer` with underscores for dots, `kind`.

    The component may also be `DENOISER`, `CLIP_G`, `T5`, or empty if the name does not say it. Kinds: `down`, `up`,
    `mid`, `up_bias`, `alpha`, `magnitude`, `dora_scale`, `diff`, `diff_b`, `scalar`, and the factors of LoHa and LoKr
    by their names in files.
    """

    component: str
    layer: str
    kind: str


def parse(name: str) -> TensorName | None:
    """What a tensor's name says; `None` if it is none of an adapter's layer."""
    ending = _ENDING.search(name)
    if ending is None or _LORA.search(name) is None:
        return None
    layer, kind = name[: ending.start()], _kind(ending)
    if kind is None:
        return None
    component, layer = _component(layer)
    return TensorName(component, _layer(layer, ending["stream"] or "").replace(".", "_"), kind)


def _kind(ending: re.Match[str]) -> str | None:
    if ending["half"]:
        half = _HALVES[ending["half"]]
        if ending["what"] == ".bias":
            return "up_bias" if half == "up" else None
        return half
    if ending["old"]:
        return ending["old"]
    return "magnitude" if ending["magnitude"] else ending["plain"]


def _component(layer: str) -> tuple[str, str]:
    bare = layer.removeprefix(_WRAPPED)
    for prefix, component in _PREFIXES:
        if bare.startswith(prefix):
            return component, bare.removeprefix(prefix)
    return "", bare


def _layer(layer: str, stream: str) -> str:
    """The layer that a processor's tensor stands for."""
    head, processor, tail = layer.rpartition(".processor.")
    if not processor:
        return layer.removesuffix(".lora")
    if head.startswith("double_blocks."):
        return f"{head}.{_XLABS.get(tail + stream, tail + stream)}"
    if head.startswith("single_blocks."):
        return f"{head}.linear2" if tail == "proj" else f"{head}.{tail}"
    return f"{head}.{tail}.0" if tail == "to_out" else f"{head}.{tail}"
