"""Components that another model of MODELS_DIR gives a pipeline: the UNet of an SDXL refiner, the encoders of Redux."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stable_diffusion_server.pipelines.loading.checkpoint_layout import DENOISER
from stable_diffusion_server.pipelines.loading.compatibility import check_redux, check_refiner
from stable_diffusion_server.pipelines.loading.model_files import translate_load_errors
from stable_diffusion_server.pipelines.loading.part_networks import files_of_place, networks_of
from stable_diffusion_server.pipelines.loading.redux_encoder import REDUX, load_redux
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.loading.weight_files import check_part, texts_in
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec


def load_added(spec: ModelSpec, models_dir: Path, dtype: torch.dtype, *, meta: bool = False) -> dict[str, Any]:
    """The components of `spec.added_parts` by name, on the CPU; with `meta` without weights.

    Raises `ModelLoadError`.
    """
    parts = {}
    for component, place in spec.added_parts:
        with translate_load_errors(place, models_dir):
            if component == "refiner":
                files = CheckpointFiles("sdxl", ((DENOISER, _unet_place(models_dir, place)),))
                unet = networks_of(files, models_dir, spec.variant, dtype, ignore_progress, meta=meta, only=(DENOISER,))
                parts[component] = unet["unet"]
            else:
                parts[component] = load_redux(models_dir / place, place, dtype, spec.variant, meta=meta)
    return parts


def added_files(spec: ModelSpec, models_dir: Path) -> dict[str, Path]:
    """The files that these components are read from, by what they are used for. Raises `ModelLoadError`."""
    found: dict[str, Path] = {}
    for component, place in spec.added_parts:
        with translate_load_errors(place, models_dir):
            if component == "refiner":
                files = files_of_place(models_dir / _unet_place(models_dir, place), DENOISER, spec.variant)
            else:
                folder = models_dir / place
                files = [*texts_in(folder / "feature_extractor")]
                for name, stem in REDUX:
                    files += [folder / name / "config.json", *check_part(folder / name, stem, spec.variant).files]
        found |= {f"{component}/{file.parent.name}/{file.name}": file for file in files}
    return found


def with_added(pipeline: Any, parts: Mapping[str, Any], spec: ModelSpec) -> Any:
    """The pipeline with these components. Raises `ModelLoadError` for one that does not fit the others."""
    places = dict(spec.added_parts)
    if "refiner" in parts:
        from stable_diffusion_server.pipelines.loading.refined_pipeline import (
            RefinedXLPipeline,  # importing SDXL's pipeline warns of optional packages
        )

        check_refiner(places["refiner"], pipeline, parts["refiner"])
        given = {name: part for name, part in pipeline.components.items() if name != "refiner"}
        zeros = pipeline.config.force_zeros_for_empty_prompt
        pipeline = RefinedXLPipeline(**given, refiner=parts["refiner"], force_zeros_for_empty_prompt=zeros)
        pipeline.set_progress_bar_config(disable=True)
    if "image_encoder" in parts:
        check_redux(places["image_encoder"], pipeline, parts["image_encoder"].image_embedder)
        pipeline.register_modules(image_encoder=parts["image_encoder"])
    return pipeline


def _unet_place(models_dir: Path, place: str) -> str:
    """The place of a model's UNet: a folder within its own, or its file."""
    return f"{place}/unet" if (models_dir / place / "unet").is_dir() else place
