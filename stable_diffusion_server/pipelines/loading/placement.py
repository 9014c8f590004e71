"""Decides from free memory where a model's weights are kept and whether they are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge

Offload = Literal["auto", "none", "model", "group", "sequential"]
Quantize = Literal["auto", "none", "int8", "float8", "torchao-int8", "torchao-float8", "torchao-float8-dynamic"]

# Share of the free memory that is used; the rest is left for fragmentation, the allocator and other processes.
USABLE = 0.9
# Values of QUANTIZE that OFFLOAD=sequential allows: accelerate moves only plain tensors.
MOVED_BY_LAYERS = ("auto", "none")
# The ControlNet: not a component of the pipeline, so diffusers' model and sequential offload do not move it.
CONTROL = "control"


class Residency(StrEnum):
    """Where weights are kept between forward passes, the fastest first.

    `model` moves whole components to the device, one at a time; `group` moves layers and prefetches the next one;
    `sequential` moves layers one at a time.
    """

    RESIDENT = "resident"
    MODEL = "model"
    GROUP = "group"
    SEQUENTIAL = "sequential"


class Quantization(StrEnum):
    """The format of the weights of the large components, and the package that quantizes them. `none` keeps their dtype.

    `torchao-float8-dynamic` also computes in float8: it rounds each layer's inputs, scaled by their largest value.
    """

    NONE = "none"
    INT8 = "int8"
    FLOAT8 = "float8"
    TORCHAO_INT8 = "torchao-int8"
    TORCHAO_FLOAT8 = "torchao-float8"
    TORCHAO_FLOAT8_DYNAMIC = "torchao-float8-dynamic"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model needs, in bytes: `parts` by name, the `quantized` ones of them, the largest `layer`.

    `weight_bytes` is the size of one weight as loaded, `working` what one request needs besides the weights.
    """

    parts: Mapping[str, int]
    quantized: tuple[str, ...]
    layer: int
    weight_bytes: int
    working: int = 0

    def shrunk(self) -> Footprint:
        """The footprint with one byte for each weight of the quantized parts."""
        parts = {
            name: size // self.weight_bytes if name in self.quantized else size for name, size in self.parts.items()
        }
        return Footprint(parts, self.quantized, self.layer // self.weight_bytes, self.weight_bytes, self.working)

    def needed(self, residency: Residency) -> int:
        """Peak bytes on the device."""
        stays = self.parts.get(CONTROL, 0)
        moved = [size for name, size in self.parts.items() if name != CONTROL]
        weights = {
            Residency.RESIDENT: sum(moved) + stays,
            Residency.MODEL: max(moved, default=0) + stays,
            Residency.GROUP: 2 * self.layer,  # the layer that computes, and the next one being prefetched
            Residency.SEQUENTIAL: stays,
        }
        return weights[residency] + self.working


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen placement, and the bytes it needs on the device."""

    residency: Residency
    quantization: Quantization
    needed: int


# In the order in which they are tried: each needs less memory than the one before, but is slower or less exact.
_LADDER = (
    (Residency.RESIDENT, Quantization.NONE),
    (Residency.MODEL, Quantization.NONE),
    (Residency.RESIDENT, Quantization.INT8),
    (Residency.MODEL, Quantization.INT8),
    (Residency.GROUP, Quantization.NONE),
    (Residency.SEQUENTIAL, Quantization.NONE),
)


def place(
    free: int,
    footprint: Footprint,
    *,
    accelerated: bool,
    offload: Offload = "auto",
    quantize: Quantize = "auto",
) -> Placement:
    """The first placement that fits into `free` bytes of the device's memory and that the settings allow.

    A setting other than `auto` is followed even if another placement would fit better. On the CPU (`accelerated`
    false) weights cannot be offloaded. Raises `ModelTooLarge` when nothing fits, `ModelLoadError` when OFFLOAD
    cannot be applied, or cannot be combined with QUANTIZE.
    """
    if offload == "sequential" and quantize not in MOVED_BY_LAYERS:
        raise ModelLoadError(
            f"OFFLOAD=sequential cannot be combined with QUANTIZE={quantize}: quantized weights cannot be moved layer "
            "by layer. Take OFFLOAD=group or OFFLOAD=model, or QUANTIZE=none."
        )
    if not accelerated and offload not in ("auto", "none"):
        raise ModelLoadError(f"OFFLOAD={offload} needs an accelerator: the CPU has its weights in its memory already.")
    quantized = footprint.shrunk()
    candidates = [
        Placement(
            residency,
            quantization,
            (footprint if quantization is Quantization.NONE else quantized).needed(residency),
        )
        for residency, quantization in _allowed(accelerated, offload, quantize)
    ]
    fitting = [placement for placement in candidates if placement.needed <= USABLE * free]
    if fitting:
        return fitting[0]
    if offload != "auto" and quantize != "auto":
        return candidates[-1]  # both settings are explicit
    least = min(placement.needed for placement in candidates)
    raise ModelTooLarge(f"The model needs {gigabytes(least)} of memory, and {gigabytes(free)} are free.")


def _allowed(accelerated: bool, offload: Offload, quantize: Quantize) -> list[tuple[Residency, Quantization]]:
    """The placements that the settings allow, in the order in which they are tried."""
    if offload == "none" or not accelerated:
        residencies = {Residency.RESIDENT}
    else:
        residencies = set(Residency) if offload == "auto" else {Residency(offload)}
    if quantize == "auto":
        rungs = [rung for rung in _LADDER if rung[0] in residencies]
        return rungs or [(residency, Quantization.NONE) for residency in residencies]
    if quantize not in MOVED_BY_LAYERS:
        residencies -= {Residency.SEQUENTIAL}
    return [(residency, Quantization(quantize)) for residency in Residency if residency in residencies]


def gigabytes(size: int) -> str:
    """A number of bytes as people write it: `6.9 GB`."""
    return f"{size / 1e9:.1f} GB"
