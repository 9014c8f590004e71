"""Finds which parts of a model are stored in another dtype than they are loaded in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.added_parts import added_files
from stable_diffusion_server.pipelines.loading.checkpoint_layout import COMPONENTS, DENOISER
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.model_files import (
    CONTROL_VARIANT,
    control_place,
    model_folder,
)
from stable_diffusion_server.pipelines.loading.placement import CONTROL
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    SAFETENSORS,
    TRANSFORMERS,
    WeightFileError,
    read_header,
    weight_files,
)
from stable_diffusion_server.pipelines.loading.working_memory import Architecture
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def converted_bytes(spec: ModelSpec, models_dir: Path, model: Architecture, *, hub: HubClient | None = None) -> int:
    """Bytes of the parts that loading copies in the machine's memory, because their files hold another dtype.

    Parts in their own dtype are mapped from their files, so the kernel can take their memory back. Files that cannot be
    used count as none: loading reports them.
    """
    return sum(
        model.bytes[name]
        for name in model.parts
        if name not in model.packed and _is_converted(spec, models_dir, name, model.dtypes[name], hub)
    )


def _is_converted(spec: ModelSpec, models_dir: Path, name: str, dtype: torch.dtype, hub: HubClient | None) -> bool:
    try:
        return bool(_stored_as(_files_of(spec, models_dir, name, hub)) != dtype)
    except (WeightFileError, ModelLoadError, OSError):
        return False


def _files_of(spec: ModelSpec, models_dir: Path, name: str, hub: HubClient | None) -> Iterable[Path]:
    """The weight files of a component."""
    if name == CONTROL:
        place = control_place(spec, models_dir, hub=hub)
        if place is None or place.is_file():
            return () if place is None else [place]
        return weight_files(place, DIFFUSERS, CONTROL_VARIANT).files
    if name in dict(spec.added_parts):
        return [file for role, file in added_files(spec, models_dir).items() if role.startswith(f"{name}/")]
    if spec.checkpoint is not None:
        places, components = dict(spec.checkpoint.parts), COMPONENTS[spec.checkpoint.family]
        part = next(part for part, component in components.items() if component == name)
        place = models_dir / places.get(part, places[DENOISER])
        return sorted(place.iterdir()) if place.is_dir() else [place]
    stem = TRANSFORMERS if name.startswith("text_encoder") else DIFFUSERS
    return weight_files(model_folder(spec, models_dir, hub=hub) / name, stem, spec.variant).files


def _stored_as(files: Iterable[Path]) -> torch.dtype | None:
    """The dtype of most bytes in safetensors files; `None` for other files and for packed weights."""
    sizes: Counter[str] = Counter()
    for file in files:
        if file.suffix == SAFETENSORS:
            for tensor in read_header(file).values():
                sizes[tensor["dtype"]] += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return _DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None
