"""Measures a model before it is loaded, and places it with room for the largest work that requests may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stable_diffusion_server.errors import ModelTooLarge
from stable_diffusion_server.pipelines.conditioning.lora import MAX_IDLE
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.loading.footprint import (
    Workload,
    architecture_of,
    dtype_of,
    footprint_of,
    free_memory,
    native_tiling,
)
from stable_diffusion_server.pipelines.loading.host_memory import free_host_memory
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.placement import (
    Footprint,
    Placement,
    least_needed,
    place,
    still_fits,
)
from stable_diffusion_server.pipelines.loading.stored_dtypes import converted_bytes
from stable_diffusion_server.pipelines.loading.working_memory import Architecture
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling

# On the CPU, oneDNN copies inputs and weights of convolutions: 1.26 to 1.3 of the count for SDXL's VAE at 128² to 256².
_CPU_COPIES = 1.3
# Share of a device's memory that is free before a model is loaded, unless others use the device.
_USUALLY_FREE = 0.95
# Steps between the native and the largest size in which tiling is decided.
_SHARES = 8


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Free bytes: of the `device`, and of the machine (`host`) where the device has its own.

    `turn` is what drawing with another loaded model takes on the device; only one model draws at a time.
    """

    device: int
    host: int | None = None
    turn: int = 0

    @classmethod
    def now(cls, device: torch.device, *, turn: int = 0, most: int | None = None) -> MemoryRoom:
        """What is free now, at most `most` bytes of the device."""
        free = free_memory(device)
        host = free_host_memory() if device.type == "cuda" else None
        return cls(free if most is None else min(free, most), host, turn)

    def limits(self) -> dict[str, Any]:
        """What `place` takes besides the device's free memory."""
        return {"host": self.host, "turn": self.turn}


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """What decides a model's memory: its networks without weights, the tiling of its VAE, bytes of a `Footprint`.

    `overhead` is what the device takes for each byte that is counted.
    """

    spec: ModelSpec
    model: Architecture
    tiling: VaeTiling = WHOLE
    adapters: int = 0
    converted: int = 0
    overhead: float = 1.0

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        parts: Mapping[str, torch.nn.Module],
        models_dir: Path,
        device: torch.device,
        loras: LoraFolder,
        hub: HubClient | None = None,
    ) -> MeasuredModel:
        """Measure a model whose `parts` are on the meta device; without tiling."""
        model = architecture_of(spec, parts, dtype_of(spec, device))
        adapters = loras.largest_bytes(spec.denoiser_part, MAX_IDLE)
        converted = converted_bytes(spec, models_dir, model, hub=hub)
        overhead = _CPU_COPIES if device.type == "cpu" else 1.0
        return cls(spec, model, adapters=adapters, converted=converted, overhead=overhead)

    def tiled(self, memory: int, work: Workload, **settings: Any) -> MeasuredModel:
        """With the tiling that suits a device of `memory` bytes in all: see docs/models.md.

        Larger images than native ones are decoded whole as far as that does not change where the empty device would
        keep the weights. What is free plays no part, so a request gives the same picture at any time.
        """
        work, usual = replace(work, max_batch=1), int(_USUALLY_FREE * memory)
        native = replace(self, tiling=native_tiling(self.spec, self.model, memory))
        try:
            placement = place(usual, native.footprint(work), **settings)
        except ModelTooLarge:
            return native
        least, most = native.tiling.whole_pixels, work.largest_pixels
        for pixels in (least + (most - least) * share // _SHARES for share in range(_SHARES, 0, -1) if most > least):
            larger = replace(self, tiling=replace(native.tiling, whole_pixels=pixels))
            if still_fits(placement, usual, larger.footprint(work)) is not None:
                return larger
        return native

    def footprint(self, work: Workload) -> Footprint:
        """What the model needs for some work."""
        footprint = footprint_of(
            self.spec, self.model, work, self.tiling, adapters=self.adapters, converted=self.converted
        )
        return replace(footprint, working={name: int(self.overhead * size) for name, size in footprint.working.items()})

    def least(self, work: Workload, **settings: Any) -> int:
        """The bytes of the device's memory without which the model cannot be placed even for one native image."""
        return least_needed(self.footprint(self._native(work)), **settings)

    def place(self, room: MemoryRoom, work: Workload, **settings: Any) -> tuple[Placement, str]:
        """The placement that holds the largest image, with batches as large as fit, and a remark if it does not.

        Where no placement holds the largest image, one for images of the native size is taken. `settings` are those of
        `placement.place`, whose errors it raises.
        """
        remark = ""
        alone = replace(work, max_batch=1)
        settings |= room.limits()
        try:
            placement = place(room.device, self.footprint(alone), **settings)
        except ModelTooLarge as error:
            native = self._native(work)
            placement = place(room.device, self.footprint(native), **settings)
            remark = (
                f"{self.spec.name} has memory for images of {native.largest_pixels} pixels; larger ones, within "
                f"MAX_SIDE, may need tiles or fail. {error.detail}"
            )
            alone = native
        for batch in range(work.max_batch, 1, -1):
            larger = still_fits(
                placement, room.device, self.footprint(replace(alone, max_batch=batch)), **room.limits()
            )
            if larger is not None:
                return replace(larger, batch_pixels=replace(alone, max_batch=batch).batch_pixels), remark
        return replace(placement, batch_pixels=alone.batch_pixels), remark

    def _native(self, work: Workload) -> Workload:
        return Workload(min(self.spec.native_pixels, work.largest_pixels))
