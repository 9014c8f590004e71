"""Decides from free memory where a model's weights are kept and whether they are quantized."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

    `weight_bytes` is the size of one weight as loaded, `working` what the work of each part needs besides the weights.
    `adapters` may be added to the `denoiser`. `converted` are the bytes of parts whose files hold another dtype: such
    parts are copied in the machine's memory while they are loaded; files of the right dtype are mapped.
    """

    parts: Mapping[str, int]
    quantized: tuple[str, ...]
    layer: int
    weight_bytes: int
    working: Mapping[str, int] = field(default_factory=dict)
    adapters: int = 0
    denoiser: str = ""
    converted: int = 0

    def shrunk(self) -> Footprint:
        """The footprint with one byte for each weight of the quantized parts."""
        parts = {
            name: size // self.weight_bytes if name in self.quantized else size for name, size in self.parts.items()
        }
        return replace(self, parts=parts, layer=self.layer // self.weight_bytes)

    def at_rest(self, residency: Residency) -> int:
        """Bytes on the device while nothing is drawn."""
        if residency is Residency.RESIDENT:
            return sum(self.parts.values()) + self.adapters
        return 0 if residency is Residency.GROUP else self.parts.get(CONTROL, 0)

    def in_turn(self, residency: Residency) -> int:
        """Peak bytes that drawing adds: activations, and the weights that are moved for it."""
        busiest = max(self.working.values(), default=0)
        match residency:
            case Residency.RESIDENT:
                return busiest
            case Residency.MODEL:
                return max((self._with_activations(name) for name in self.parts if name != CONTROL), default=0)
            case Residency.GROUP:
                return 2 * self.layer + busiest  # the layer that computes, and the next one being prefetched
            case Residency.SEQUENTIAL:
                return self.layer + busiest

    def needed(self, residency: Residency) -> int:
        """Peak bytes on the device."""
        return self.at_rest(residency) + self.in_turn(residency)

    def on_host(self, residency: Residency, *, quantized: bool) -> int:
        """Peak bytes of the machine's memory besides the device's: copies made by loading, and weights that wait there.

        `self` must be the footprint of the weights as they are placed.
        """
        changed = sum(self.parts.get(name, 0) for name in self.quantized) if quantized else 0
        if residency is Residency.RESIDENT:
            return max(self.converted, changed)
        return max(self.converted, sum(self.parts.values()) + self.adapters)

    def _with_activations(self, name: str) -> int:
        return self.parts[name] + self.working.get(name, 0) + (self.adapters if name == self.denoiser else 0)


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen placement, and the bytes it needs on the device.

    `turn` of them are needed only while the model draws: `moved` for weights that wait elsewhere, others for its work.
    There is room for forward passes over images of `batch_pixels` pixels together.
    """

    residency: Residency
    quantization: Quantization
    needed: int
    turn: int = 0
    moved: int = 0
    batch_pixels: int = sys.maxsize


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
    host: int | None = None,
    turn: int = 0,
) -> Placement:
    """The first placement that fits into `free` bytes of the device's memory and that the settings allow.

    `host` are the free bytes of the machine's memory, where the device has its own. `turn` is what drawing with another
    loaded model takes on the device; only one model draws at a time.

    A setting other than `auto` is followed even if another placement would fit better. On the CPU (`accelerated`
    false) weights cannot be offloaded. Raises `ModelTooLarge` when nothing fits, and also for explicit settings if the
    machine's memory is too small, since its kernel would end the process; `ModelLoadError` when OFFLOAD cannot be
    applied, or cannot be combined with QUANTIZE.
    """
    if offload == "sequential" and quantize not in MOVED_BY_LAYERS:
        raise ModelLoadError(
            f"OFFLOAD=sequential cannot be combined with QUANTIZE={quantize}: quantized weights cannot be moved layer "
            "by layer. Take OFFLOAD=group or OFFLOAD=model, or QUANTIZE=none."
        )
    if not accelerated and offload not in ("auto", "none"):
        raise ModelLoadError(f"OFFLOAD={offload} needs an accelerator: the CPU has its weights in its memory already.")
    candidates = [
        _Candidate.of(footprint, residency, quantization)
        for residency, quantization in _allowed(accelerated, offload, quantize)
    ]
    on_host = [one for one in candidates if one.fits_host(host)]
    fitting = [one for one in on_host if one.fits_device(free, turn)]
    if fitting:
        return fitting[0].placement
    if not on_host:
        least = min(one.host for one in candidates)
        raise ModelTooLarge(
            f"The model needs {gigabytes(least)} of the machine's memory (RAM) while it is loaded or where its weights "
            f"wait, and {gigabytes(host or 0)} are free."
        )
    if offload != "auto" and quantize != "auto":
        return on_host[-1].placement  # both settings are explicit
    least = min(one.rest + max(one.turn, turn) for one in on_host)
    raise ModelTooLarge(f"The model needs {gigabytes(least)} of memory, and {gigabytes(free)} are free.")


def least_needed(footprint: Footprint, *, accelerated: bool, offload: Offload, quantize: Quantize) -> int:
    """The bytes of the device's memory without which no placement that the settings allow holds a model."""
    allowed = _allowed(accelerated, offload, quantize)
    return min(_Candidate.of(footprint, *one).placement.needed for one in allowed)


def still_fits(
    placement: Placement, free: int, footprint: Footprint, *, host: int | None = None, turn: int = 0
) -> Placement | None:
    """The same placement for another footprint, if it fits."""
    one = _Candidate.of(footprint, placement.residency, placement.quantization)
    return one.placement if one.fits_host(host) and one.fits_device(free, turn) else None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A placement with its bytes: at rest and in a turn on the device, and on the host."""

    placement: Placement
    rest: int
    turn: int
    host: int

    @classmethod
    def of(cls, plain: Footprint, residency: Residency, quantization: Quantization) -> _Candidate:
        finer = quantization is not Quantization.NONE
        footprint = plain.shrunk() if finer else plain
        rest, turn = footprint.at_rest(residency), footprint.in_turn(residency)
        host = footprint.on_host(residency, quantized=finer)
        moved = replace(footprint, working={}).in_turn(residency)
        return cls(Placement(residency, quantization, rest + turn, turn, moved), rest, turn, host)

    def fits_device(self, free: int, turn: int) -> bool:
        """Whether it fits into `free` bytes, beside a model that takes `turn` bytes while it draws."""
        return self.rest + max(self.turn, turn) <= USABLE * free

    def fits_host(self, free: int | None) -> bool:
        """Whether it fits into the machine's memory, if that is another one."""
        return free is None or self.host <= USABLE * free


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
