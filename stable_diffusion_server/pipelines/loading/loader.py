"""Brings a model from its files to where it draws: identified, placed, quantized, made fast. Knows no jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from stable_diffusion_server.errors import InvalidInput, ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.acceleration.apply import apply_optimizations
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.catalog import MODELS, ModelSpec, with_quantization, with_weights
from stable_diffusion_server.pipelines.conditioning.controlnet import check_grid
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager, add_to_controlnet
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.conditioning.prompt_cache import LIMIT_BYTES
from stable_diffusion_server.pipelines.loading.compatibility import check_controlnet
from stable_diffusion_server.pipelines.loading.components import (
    control_files,
    dtype_of,
    empty_pipeline,
    lcm_file,
    load_controlnet,
    load_pipeline,
    lora_file,
    model_files,
)
from stable_diffusion_server.pipelines.loading.device_memory import free_memory
from stable_diffusion_server.pipelines.loading.footprint import footprint_of
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.offload import apply_residency, copy_out_of_files
from stable_diffusion_server.pipelines.loading.placement import (
    CONTROL,
    Offload,
    Placement,
    Quantization,
    Quantize,
    Residency,
    place,
)
from stable_diffusion_server.pipelines.loading.quantization import compress, quantize_parts
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests

_log = structlog.get_logger(__name__)

# Weights in other types are turned into the loaded one for every product, which no layout or compiler makes fast.
COMPUTED_FAST = (Quantization.NONE, Quantization.TORCHAO_FLOAT8_DYNAMIC)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load and how: `models` by family (see `catalog.choose_models`), from the hub too with `hub`.

    Where the device cannot hold one of them and `instead` has another of its name, that one is loaded. `digests`
    tell weights from any others. Those that stay in memory are copies of their files, unless `mapped`. `lora_dir`
    holds the adapters a job may name, or `loras`, where it is looked after by others too; `controlnet_lora` goes on
    Flux's ControlNet, the weights `dfloat11` into its transformer. `offload` and `quantize` force what else follows
    from free memory; `performance` is how weights that stay on the device, as they were loaded, are made to
    compute. The VAE may decode a batch one by one (`vae_slicing`) or a large picture in overlapping tiles
    (`vae_tiling`), which takes less memory and changes such pictures a little; so does attention computed in
    slices. Each model keeps up to `prompt_cache_bytes` of encoded prompts.
    """

    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MODELS)
    instead: Mapping[str, ModelSpec] = field(default_factory=dict)
    hub: HubClient | None = None
    digests: WeightDigests = field(default_factory=WeightDigests)
    mapped: bool = False
    lora_dir: Path | None = None
    loras: LoraFolder | None = None
    controlnet_lora: str = ""
    dfloat11: str = ""
    offload: Offload = "auto"
    quantize: Quantize = "auto"
    performance: str = "off"
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    prompt_cache_bytes: int = LIMIT_BYTES

    @property
    def adapters(self) -> LoraFolder:
        """The folder of adapters."""
        return self.loras or LoraFolder(self.lora_dir)


@dataclass(slots=True)
class PlacedModel:
    """A model where it draws. `facts` are as its files have them, `commit` that of its repository on the hub.

    `remarks` say in sentences what it does without.
    """

    facts: ModelSpec
    pipeline: Any
    controlnet: Any
    adapters: LoraManager
    placement: Placement
    graphs: list[CudaGraphRunner] = field(default_factory=list)
    commit: str = ""
    remarks: list[str] = field(default_factory=list)


def place_or_fall_back(facts: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> PlacedModel:
    """The model, or the one that is loaded instead where the device cannot hold it. Raises `ModelLoadError`."""
    try:
        return place_model(facts, models_dir, device, options)
    except ModelTooLarge as error:
        other = options.instead.get(facts.name)
        if other is None or other == facts:
            raise
        _log.warning(
            "other weights are used", model=facts.name, wanted=facts.folder, used=other.folder, why=error.detail
        )
        return place_model(other, models_dir, device, options)


def place_model(facts: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> PlacedModel:
    """A model's pipeline, ControlNet and adapters, in the placement that fits the device's free memory now.

    Raises `ModelLoadError`; a ControlNet that cannot be used is done without, and remarked on.
    """
    hub = options.hub
    footprint = footprint_of(facts, empty_pipeline(facts, models_dir, hub=hub), dtype_of(facts, device))
    placement = place(
        free_memory(device),
        footprint,
        accelerated=device.type != "cpu",
        offload=options.offload,
        quantize=options.quantize,
    )
    always = [(lcm_file(facts, folder, models_dir, hub=hub), weight) for folder, weight in facts.always]
    files = {
        **model_files(facts, models_dir, hub=hub),
        **{f"always/{number}": file for number, (file, _) in enumerate(always)},
    }
    weights = options.digests.of(files)
    pipeline = load_pipeline(facts, models_dir, device, hub=hub, move=False)
    remarks: list[str] = []
    controlnet, control = _control(facts, models_dir, device, options, pipeline, remarks)
    if options.digests.of(files) != weights:
        raise ModelLoadError(f"The files in {facts.folder} were changed while they were loaded; start again.")
    try:
        adapters = LoraManager(
            pipeline,
            options.adapters,
            always,
            lambda: apply_residency(pipeline, controlnet, device, placement.residency),
        )
    except InvalidInput as error:  # of no request here
        raise ModelLoadError(error.detail) from error
    known = facts if options.quantize != "auto" else with_quantization(facts, placement.quantization)
    known = with_weights(known, weights, control)
    if controlnet is None:
        known = replace(known, control_folder=None)
    parts = {**pipeline.components, CONTROL: controlnet}
    quantize_parts([parts[name] for name in facts.quantized if parts[name] is not None], placement.quantization)
    if facts.name == "flux" and options.dfloat11:
        compress(pipeline.transformer, options.dfloat11, device)
    if not options.mapped and (device.type == "cpu" or placement.residency is not Residency.RESIDENT):
        copy_out_of_files(part for part in parts.values() if isinstance(part, torch.nn.Module))
    apply_residency(pipeline, controlnet, device, placement.residency)
    commit = hub.commit(facts.repo) if hub and facts.repo else ""
    graphs = _made_fast(pipeline, controlnet, device, placement, options)
    return PlacedModel(known, pipeline, controlnet, adapters, placement, graphs, commit, remarks)


def _control(
    facts: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions, pipeline: Any, remarks: list[str]
) -> tuple[Any, str]:
    """The ControlNet with the LoRA that belongs to it, and the digest of both; without one, `None` and nothing."""
    hub = options.hub
    try:
        controlnet = load_controlnet(facts, models_dir, device, hub=hub, move=False)
        if controlnet is None:
            return None, ""
        files = control_files(facts, models_dir, hub=hub)
        check_controlnet(facts.control_folder or "", pipeline, controlnet)
        if hasattr(pipeline, "unet"):
            check_grid(controlnet, pipeline.vae_scale_factor)
    except ModelLoadError as error:
        _log.warning(
            "a ControlNet cannot be used", model=facts.name, folder=facts.control_folder, why=error.detail
        )  # told in a sentence
        remarks.append(f"{facts.name} draws without its ControlNet: {error.detail}")
        return None, ""
    if facts.name == "flux" and options.controlnet_lora:
        lora = lora_file(options.controlnet_lora, models_dir, hub=hub)
        add_to_controlnet(controlnet, lora)
        files = {**files, "lora": lora}
    return controlnet, options.digests.of(files)


def _made_fast(
    pipeline: Any, controlnet: Any, device: torch.device, placement: Placement, options: LoadOptions
) -> list[CudaGraphRunner]:
    """Have the parts compute as the settings ask for; the recordings that are made then."""
    graphs: list[CudaGraphRunner] = []
    if placement.residency == Residency.RESIDENT and placement.quantization in COMPUTED_FAST:
        graphs = apply_optimizations(
            pipeline, controlnet, device, options.performance, steady=options.adapters.folder is None
        )
    if options.attention_slicing:
        pipeline.enable_attention_slicing()
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    return graphs
