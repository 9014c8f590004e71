"""Loads the components of a diffusers pipeline, and refuses files that are incomplete or do not belong together."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.added_parts import load_added, with_added
from stable_diffusion_server.pipelines.loading.blocks_pipeline import blocks_pipeline
from stable_diffusion_server.pipelines.loading.compatibility import check_pipeline
from stable_diffusion_server.pipelines.loading.complete_networks import class_of, empty_network, load_complete
from stable_diffusion_server.pipelines.loading.controlnet_file import class_of_file, controlnet_of_file
from stable_diffusion_server.pipelines.loading.footprint import dtype_of
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.model_files import (
    CONTROL_VARIANT,
    control_place,
    model_folder,
    translate_load_errors,
)
from stable_diffusion_server.pipelines.loading.packed_weights import UNPACKED, WeightStorage
from stable_diffusion_server.pipelines.loading.pipeline_parts import assembled_here, has_pipeline_parts
from stable_diffusion_server.pipelines.loading.placement import CONTROL
from stable_diffusion_server.pipelines.loading.single_file import empty_checkpoint, load_checkpoint
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    WeightPart,
    check_part,
    check_texts,
    parts_of,
    read_json,
    unused_parts,
)
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.stock_classes import stock_class

_PROCESSORS, _COSMOS = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor"), "CosmosTransformer3DModel"


def load_pipeline(
    spec: ModelSpec,
    models_dir: Path,
    device: torch.device,
    *,
    hub: HubClient | None = None,
    move: bool = True,
    report: Callable[[float], None] = ignore_progress,
    storage: WeightStorage = UNPACKED,
) -> Any:
    """The diffusers pipeline of a model, in its dtype for `device`, and moved there unless `move` is false.

    Its weights require no gradients: for layers that do, PyTorch multiplies small batches in another order, which
    changes the rounding. Downloads a missing folder if there is a `hub`. Raises `ModelLoadError` when files are
    missing, damaged or of another class, or when the components do not fit each other. `report` receives the share of
    the components that is loaded. `storage` applies to single files.
    """
    quieten_libraries()
    dtype = dtype_of(spec, device)
    if spec.checkpoint is not None:
        pipeline = load_checkpoint(spec, models_dir, dtype, report, storage)
        pipeline = with_added(pipeline, load_added(spec, models_dir, dtype), spec)
        pipeline.scheduler.register_to_config(**dict(spec.scheduler_options))
        return pipeline.to(device) if move else pipeline
    folder = model_folder(spec, models_dir, hub=hub)
    with translate_load_errors(spec.folder, folder):
        variants = _check(spec, folder)
        parts = {}
        for number, (part, variant) in enumerate(variants.items(), 1):
            name = f"{spec.folder}/{part.name}"
            parts[part.name] = load_complete(class_of(part), folder / part.name, name, dtype, variant)
            report(number / len(variants))
        parts |= _processors(folder)
        pipeline = _assembled(spec, folder, dtype, parts)
        check_pipeline(spec.folder, pipeline)
        vae = getattr(pipeline, "vae", None)
        if vae is not None and vae.config.get("force_upcast") and dtype == torch.float16:
            vae.to(torch.float32)  # SDXL's VAE overflows in fp16
    pipeline.set_progress_bar_config(disable=True)
    pipeline = with_added(pipeline, load_added(spec, models_dir, dtype), spec)
    pipeline.scheduler.register_to_config(**dict(spec.scheduler_options))
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline.to(device) if move else pipeline


def _assembled(spec: ModelSpec, folder: Path, dtype: torch.dtype, parts: dict[str, Any]) -> Any:
    """The pipeline of a folder from its networks and, where they are not given, its other parts."""
    kind = getattr(diffusers, spec.pipeline_class)
    known = stock_class(spec.pipeline_class)
    if known is not None and known.modular:
        return blocks_pipeline(kind, folder, parts)
    if has_pipeline_parts(folder):
        others = {
            part.name: class_of(part).from_pretrained(folder / part.name, local_files_only=True)
            for part in parts_of(folder)
            if part.name not in parts
        }
        return assembled_here(kind, folder, {**parts, **others}, unused_parts(spec.pipeline_class))
    if getattr(kind, "_load_connected_pipes", False):
        kind._load_connected_pipes = False  # a README of the folder would name further models to load
    return kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        **parts,
        **unused_parts(spec.pipeline_class),
    )


def _processors(folder: Path) -> dict[str, Any]:
    """The processors for prompts with pictures, which the library builds with torchvision only; see the module."""
    parts = parts_of(folder)
    names = [part.name for part in parts if part.kind in _PROCESSORS]
    if not names and all(part.kind != _COSMOS for part in parts):
        return {}
    from stable_diffusion_server.pipelines.loading.vision_processor import (  # imports many modules
        PictureProcessor,
        give_cosmos_a_resize,
    )

    give_cosmos_a_resize()
    return {name: PictureProcessor.from_folder(folder / name) for name in names}


def load_controlnet(
    spec: ModelSpec, models_dir: Path, device: torch.device, *, hub: HubClient | None = None, move: bool = True
) -> Any:
    """The model's ControlNet for edges, in the model's dtype for `device`; `None` if it has none.

    Raises `ModelLoadError` as `load_pipeline`.
    """
    folder = control_place(spec, models_dir, hub=hub)
    if folder is None or spec.control_folder is None:
        return None
    with translate_load_errors(spec.control_folder, folder):
        network = control_network(spec.control_folder, folder, (spec.control_class,), dtype_of(spec, device))
    return network.to(device) if move else network


def control_network(name: str, place: Path, classes: Sequence[str], dtype: torch.dtype) -> Any:
    """The ControlNet of one of these diffusers classes in a file or folder, on the CPU.

    Raises `ModelLoadError` for one of another class, `WeightFileError` for files that do not fit together, and the
    libraries' errors.
    """
    if place.is_file():
        found = class_of_file(place) if len(classes) > 1 else classes[0]
        network = controlnet_of_file(place, found, dtype)
    else:
        found = str(read_json(place / "config.json").get("_class_name"))
        if found not in classes:
            raise ModelLoadError(f"{name} holds a {found[:100]}, and a {' or '.join(classes)} is needed.")
        variant = check_part(place, DIFFUSERS, CONTROL_VARIANT).variant
        network = load_complete(getattr(diffusers, found), place, name, dtype, variant)
    network.requires_grad_(False)
    return network


def empty_pipeline(
    spec: ModelSpec, models_dir: Path, *, hub: HubClient | None = None, storage: WeightStorage = UNPACKED
) -> dict[str, torch.nn.Module]:
    """The model's components by name, without weights (on torch's meta device), from configurations or file headers.

    Its ControlNet is the component `control`, if it has one. Raises `ModelLoadError` when configurations are missing
    or of another class.
    """
    single = spec.checkpoint is not None
    parts = empty_checkpoint(spec, models_dir, storage) if single else _empty_folder(spec, models_dir, hub)
    parts |= load_added(spec, models_dir, torch.float32, meta=True)
    try:
        edges = control_place(spec, models_dir, hub=hub)
        if edges is not None:
            with translate_load_errors(spec.control_folder or "", edges):
                parts[CONTROL] = _empty_control(spec.control_class, edges)
    except ModelLoadError:  # reported when it is loaded; the model works without it
        parts.pop(CONTROL, None)
    return parts


def _empty_control(class_name: str, place: Path) -> torch.nn.Module:
    if place.is_file():
        empty: torch.nn.Module = controlnet_of_file(place, class_name, torch.float32, meta=True)
        return empty
    with torch.device("meta"):
        control_class = getattr(diffusers, class_name)
        made: torch.nn.Module = control_class.from_config(control_class.load_config(place))
        return made


def _empty_folder(spec: ModelSpec, models_dir: Path, hub: HubClient | None) -> dict[str, torch.nn.Module]:
    folder = model_folder(spec, models_dir, hub=hub)
    parts: dict[str, torch.nn.Module] = {}
    with translate_load_errors(spec.folder, folder), torch.device("meta"):
        for part in (part for part in parts_of(folder) if part.has_weights):
            part_class = class_of(part)
            parts[part.name] = empty_network(part_class, folder / part.name)
    return parts


def _check(spec: ModelSpec, folder: Path) -> dict[WeightPart, str | None]:
    """The variant of each network's weights. Checks all files before gigabytes are loaded. Raises `WeightFileError`."""
    variants = {}
    for part in parts_of(folder):
        check_texts(folder / part.name)
        class_of(part)  # diffusers would import whatever library an index names
        if part.has_weights:
            variants[part] = check_part(folder / part.name, part.stem, spec.variant).variant
    return variants


def quieten_libraries() -> None:
    """Turn off the libraries' progress bars and warnings on optional packages; errors still show."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # diffusers warns for each text encoder that a LoRA does not cover, which is the common case.
    logging.getLogger("diffusers.loaders").setLevel(logging.ERROR)
    # The first two concern several LoRAs in one model and removing one that does not fit: both intended. The third is
    # diffusers' own use of what it deprecates, the last the rounding of torchsde's times.
    logging.getLogger("diffusers.guiders").setLevel(logging.ERROR)  # it calls each guider an experiment
    logging.getLogger("diffusers.modular_pipelines").setLevel(logging.CRITICAL)  # it logs what it raises
    for message in (
        "Already found a `peft_config` attribute",
        "Adapter .* was active which is now deleted",
        "`FluxPosEmbed` is deprecated",
        "Should have t[ab]",
    ):
        warnings.filterwarnings("ignore", message=message)
