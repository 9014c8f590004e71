"""Reads the tensors of a LoRA file, and refuses those that no LoRA has."""

from __future__ import annotations

import math
import re

import safetensors.torch
import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import LoraMismatch
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile

Tensors = dict[str, torch.Tensor]

_MOST_TENSORS, _LONGEST_NAME, _MOST_SIDES = 8192, 300, 8
# No model has so many blocks; a number of many digits is no name of a layer.
_LARGE_NUMBER = re.compile(r"\d{4}")


def tensors_of(file: LoraFile) -> Tensors:
    """The file's tensors, in their own memory. Raises `LoraMismatch` for tensors that do not belong in a LoRA."""
    names = file.header.tensors
    if len(names) > _MOST_TENSORS:
        raise LoraMismatch(f"holds {len(names)} tensors, and {_MOST_TENSORS} are taken")
    if odd := [name for name in names if len(name) > _LONGEST_NAME or _LARGE_NUMBER.search(name)]:
        raise LoraMismatch(f"holds {shown(odd[0])}, which is for no layer of a model")
    try:
        tensors = safetensors.torch.load(file.data)
    except Exception as error:  # safetensors raises its own errors and those of torch and Python
        raise LoraMismatch("cannot be read as safetensors") from error
    for name, tensor in tensors.items():
        if tensor.ndim > _MOST_SIDES:  # PyTorch does not support more than 64
            raise LoraMismatch(f"holds a tensor of {tensor.ndim} dimensions ({shown(name)})")
        _check_numbers(name, tensor)
    return {name: _computable(tensor) for name, tensor in tensors.items()}


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    if name.endswith("alpha"):
        if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor.reshape(()).item().real)) or alpha < 0:
            raise LoraMismatch(f"holds a scale that is none ({shown(name)})")
    elif not tensor.is_floating_point() or not tensor.numel():
        raise LoraMismatch(
            f"holds a tensor of {str(tensor.dtype).removeprefix('torch.')}, {list(tensor.shape)} ({shown(name)})"
        )
    elif not torch.isfinite(_computable(tensor)).all():
        raise LoraMismatch(f"holds numbers that are not finite ({shown(name)}); it may have been trained too fast")


def shown(name: str) -> str:
    """A name from a file, escaped and cut to 100 characters: files may hold any text."""
    return ascii(name[:100])


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """Convert one-byte floats to bf16: PyTorch cannot compute in them."""
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
