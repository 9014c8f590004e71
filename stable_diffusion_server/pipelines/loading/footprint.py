"""Chooses device and dtype, and computes the bytes of a model's components before and after loading."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.host_memory import free_host_memory, total_host_memory
from stable_diffusion_server.pipelines.loading.placement import Footprint
from stable_diffusion_server.pipelines.loading.shared_weights import storages_of
from stable_diffusion_server.pipelines.loading.working_memory import Architecture, WorkingBytes
from stable_diffusion_server.pipelines.model_spec import REFINER, ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import SMALLEST_SIDE, USUAL_SIDE, WHOLE, VaeTiling

# Share of the device's whole memory that decoding an image may take before it is done in tiles.
_NATIVE_SHARE = 1 / 2
# Numbers per pixel of an image in tiles: overlapping tiles of 3 channels, their rows, and the image.
_JOINED = 13
# Side in pixels of the images of which MAX_BATCH share a forward pass; of larger ones fewer do.
BATCH_SIDE = 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """The area of the largest image in pixels, and the most requests in one forward pass."""

    largest_pixels: int = BATCH_SIDE**2
    max_batch: int = 1

    @property
    def batch_pixels(self) -> int:
        """The most pixels of all images in one forward pass."""
        return max(self.largest_pixels, self.max_batch * BATCH_SIDE**2)


USUAL_WORK = Workload()


def working_bytes(spec: ModelSpec, model: Architecture, work: Workload, tiling: VaeTiling) -> dict[str, int]:
    """Bytes that each part of a model needs for the largest work, by its name."""
    rows = 2 if spec.takes_negative_prompt else 1  # with guidance, one with the prompt and one without
    needs = {name: need.of(0) for name, need in model.working_bytes.items()}  # a text encoder reads one prompt
    vae = model.working_bytes.get("vae")
    for name in (spec.denoiser_part, *({REFINER} & needs.keys())):
        needs[name] = model.working_bytes[name].of(rows * work.batch_pixels, rows * work.max_batch)
    if vae is not None:
        needs["vae"] = vae_bytes(vae, tiling, work.largest_pixels, model.dtypes["vae"].itemsize)
    return needs


def vae_bytes(need: WorkingBytes, tiling: VaeTiling, pixels: int, itemsize: int) -> int:
    """Bytes that a VAE needs for images of up to `pixels`, if one decoded whole needs `need`."""
    whole = need.of(min(pixels, tiling.whole_pixels)) if tiling.whole_pixels else 0
    if pixels <= tiling.whole_pixels:
        return whole
    return max(whole, need.of(min(pixels, tiling.side**2)) + _JOINED * itemsize * pixels)


def native_tiling(spec: ModelSpec, model: Architecture, memory: int) -> VaeTiling:
    """The least that is decoded whole on a device with `memory` bytes: images up to a model's native size.

    On small devices, only those that take at most half of the memory. A tile is not larger than such an image.
    """
    need = model.working_bytes.get("vae")
    if need is None or not hasattr(model.parts["vae"], "use_tiling"):
        return WHOLE
    whole = min(spec.native_pixels, need.pixels_within(int(_NATIVE_SHARE * memory)))
    side = USUAL_SIDE
    while side**2 > whole and side > SMALLEST_SIDE:
        side //= 2
    return VaeTiling(whole, side)


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
    """Bytes free for this process: of the accelerator's memory, or of the machine's within its cgroup."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by the allocator
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    return free_host_memory()


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the accelerator, or of the machine within its cgroup; the same after each start."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else total_host_memory()


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes by kind: `used` by tensors (on the CPU: by the process), `reserved` for them, `free` for anyone.

    Empty when the device no longer answers.
    """
    try:
        if device.type == "cuda":
            used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
            return {"used": used, "reserved": reserved, "free": int(torch.cuda.mem_get_info(device)[0])}
        used = psutil.Process().memory_info().rss
        return {"used": used, "reserved": used, "free": free_memory(device)}
    except RuntimeError:
        return {}


def architecture_of(spec: ModelSpec, parts: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Architecture:
    """The networks of a model as they compute when it is loaded in `dtype`."""
    dtypes = {name: _dtype_of_part(part, dtype) for name, part in parts.items()}
    references = 0 if spec.image_tokens else spec.max_references  # a prompt, or latents beside the picture's
    return Architecture(parts, dtypes, spec.text_tokens + spec.image_tokens, references)


def footprint_of(
    spec: ModelSpec,
    model: Architecture,
    work: Workload = USUAL_WORK,
    tiling: VaeTiling = WHOLE,
    *,
    adapters: int = 0,
    converted: int = 0,
) -> Footprint:
    """The bytes a model needs; a ControlNet may be one of its components. Packed weights keep their size.

    `work` is the largest that requests may ask for, `tiling` that of the VAE; the last two are bytes of a `Footprint`.
    """
    return Footprint(
        parts=model.bytes,
        quantized=tuple(name for name in spec.quantizable_parts if name in model.parts and name not in model.packed),
        layer=model.largest_layer,
        weight_bytes=model.dtypes[spec.denoiser_part].itemsize,
        working=working_bytes(spec, model, work, tiling),
        adapters=adapters,
        denoiser=spec.denoiser_part,
        converted=converted,
    )


def _dtype_of_part(part: Any, dtype: torch.dtype) -> torch.dtype:
    """SDXL's VAE overflows in fp16 and computes in fp32."""
    upcast = dtype == torch.float16 and getattr(getattr(part, "config", None), "force_upcast", False)
    return torch.float32 if upcast else dtype


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
