"""Reads float8 weights, with the scales that ComfyUI stores beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from stable_diffusion_server.pipelines.loading.packed_weights import FLOAT8, PackedWeight
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

_NAMES = {dtype: name for name, dtype in FLOAT8.items()}
_SCALES = ("scale_weight", "weight_scale")
# Scales of the inputs serve float8 products, which are not used here; the marks carry no numbers.
_IGNORED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
# What comfy_quant names for weights of one byte with one scale for each matrix or row.
_FORMATS = ("float8_e4m3fn", "float8_e5m2")

Tensors = dict[str, torch.Tensor | PackedWeight]


def pack_float8(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors with each float8 matrix as a `PackedWeight` with its scale; scales and marks are taken out.

    diffusers drops the scales without a word, and the picture is noise (measured: 5 dB). Raises `WeightFileError` for
    what would be read wrongly: packed integers, unknown formats, scales without weights or of another shape.
    """
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            _check_format(name, tensor)
    packed: Tensors = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf in _SCALES or leaf in _IGNORED:
            continue
        if tensor.dtype not in _NAMES:
            if leaf == "weight" and not tensor.is_floating_point():
                raise WeightFileError(
                    f"{name} holds packed integers ({str(tensor.dtype).removeprefix('torch.')}: nvfp4, int8 or the "
                    "like), which are not read; take the fp8, GGUF or plain weights"
                )
            packed[name] = tensor
            continue
        scale_name = next((f"{prefix}.{scale}" for scale in _SCALES if f"{prefix}.{scale}" in tensors), "")
        scale = _scale_of(scale_name, tensors[scale_name], tensor) if scale_name and leaf == "weight" else None
        used |= {scale_name}
        if tensor.ndim == 2:
            packed[name] = PackedWeight(tensor.view(torch.uint8), _NAMES[tensor.dtype], scale)
        else:
            wide = tensor.float()
            packed[name] = wide if scale is None else wide * scale.reshape(-1, *[1] * (tensor.ndim - 1))
    lonely = [name for name in tensors if name.rpartition(".")[2] in _SCALES and name not in used]
    if lonely:
        raise WeightFileError(f"{lonely[0]} is the scale of a weight that is missing or not float8")
    return packed


def _check_format(name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        return
    try:
        found = json.loads(bytes(tensor.tolist())).get("format")
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{name} is not readable") from error
    if found not in _FORMATS:
        raise WeightFileError(f"{name} says the format {str(found)[:60]!r}, and {', '.join(_FORMATS)} are read")


def _scale_of(name: str, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The scale as fp32, 1 × 1 or rows × 1."""
    if scale.numel() not in (1, len(weight)) or (scale.ndim > 1 and scale.shape[0] != scale.numel()):
        raise WeightFileError(
            f"{name} has the shape {tuple(scale.shape)}, and one scale for the matrix or for each of its "
            f"{len(weight)} rows is read"
        )
    return scale.float().reshape(-1, 1)
