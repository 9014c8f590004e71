"""Chooses the device and the dtype of weights, and measures a device's memory."""

from __future__ import annotations

import psutil
import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.model_spec import ModelSpec


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
