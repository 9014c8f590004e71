"""Chooses device and dtype, and computes the bytes of a model's components before and after loading."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Mapping

import psutil
import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.packed_weights import is_packed
from stable_diffusion_server.pipelines.loading.placement import Footprint
from stable_diffusion_server.pipelines.loading.shared_weights import storages_of
from stable_diffusion_server.pipelines.model_spec import ModelSpec

# Bytes per pixel that a request needs besides the weights: roughly the widest layers of a VAE decoder.
WORKING_BYTES = 2048


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` chooses CUDA, then MPS, then the CPU.

    Raises `ModelLoadError` when the machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    device = torch.device(name)
    if not available[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ModelLoadError(f"DEVICE={name} was asked for, and this machine has no such device.")
    return device


def dtype_of(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """The dtype in which a model's weights are loaded on `device`."""
    dtype: torch.dtype = getattr(torch, spec.cpu_dtype if device.type == "cpu" else spec.dtype)
    return dtype


def free_memory(device: torch.device) -> int:
    """Bytes free on `device`: of the accelerator's memory, or of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes by kind: `used` by tensors (on the CPU: by the process), `reserved` for them, `free` for anyone.

    Empty when the device no longer answers.
    """
    try:
        if device.type == "cuda":
            used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        else:
            used = reserved = psutil.Process().memory_info().rss
        return {"used": used, "reserved": reserved, "free": free_memory(device)}
    except RuntimeError:
        return {}


def footprint_of(spec: ModelSpec, parts: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Footprint:
    """The bytes these components need in `dtype`; a ControlNet may be one of them. Packed weights keep their size."""

    def size_in(parameter: torch.Tensor) -> int:
        size = dtype.itemsize if parameter.is_floating_point() else parameter.itemsize
        return int(parameter.numel() * size)

    layers = [
        sum(map(size_in, module.parameters(recurse=False))) for part in parts.values() for module in part.modules()
    ]
    return Footprint(
        parts={name: sum(map(size_in, part.parameters())) for name, part in parts.items()},
        quantized=tuple(name for name in spec.quantizable_parts if name in parts and not is_packed(parts[name])),
        layer=max(layers, default=0),
        weight_bytes=dtype.itemsize,
        working=WORKING_BYTES * spec.native_pixels,
    )


def return_memory() -> None:
    """Free what nothing refers to any more, and return it to the device and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":  # glibc keeps freed memory; other C libraries may have no such function
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def parameters_of(module: torch.nn.Module) -> int:
    """Number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of(*modules: torch.nn.Module) -> int:
    """Bytes of the modules in memory; shared storage counts once."""
    return sum(storages_of(modules).values())
