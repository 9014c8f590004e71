"""Loads a model: identifies its weights, places, quantizes and optimizes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.acceleration.apply import Optimization, apply_optimizations, optimizations_of
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.acceleration.onednn import linear
from stable_diffusion_server.pipelines.catalog import MODELS, with_quantization, with_weights
from stable_diffusion_server.pipelines.conditioning.controlnet import check_grid
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFolder
from stable_diffusion_server.pipelines.conditioning.embedding_folder import EmbeddingFolder
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager, add_to_controlnet
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.conditioning.prompt_cache import LIMIT_BYTES
from stable_diffusion_server.pipelines.loading.added_parts import added_files
from stable_diffusion_server.pipelines.loading.compatibility import check_controlnet
from stable_diffusion_server.pipelines.loading.components import empty_pipeline, load_controlnet, load_pipeline
from stable_diffusion_server.pipelines.loading.cpu_dtype import CpuDtypes
from stable_diffusion_server.pipelines.loading.footprint import Workload, total_memory
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFolder
from stable_diffusion_server.pipelines.loading.measurement import MeasuredModel, MemoryRoom
from stable_diffusion_server.pipelines.loading.model_files import control_files, lcm_file, lora_file, model_files
from stable_diffusion_server.pipelines.loading.offload import apply_residency, copy_out_of_files
from stable_diffusion_server.pipelines.loading.packed_weights import UNPACKED, PackedLinear, WeightStorage, is_packed
from stable_diffusion_server.pipelines.loading.placement import (
    CONTROL,
    Offload,
    Placement,
    Quantization,
    Quantize,
    Residency,
)
from stable_diffusion_server.pipelines.loading.quantization import load_dfloat11, quantize_parts
from stable_diffusion_server.pipelines.loading.single_file import checkpoint_files
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests, ignore_progress
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling

_log = structlog.get_logger(__name__)

# Quantizations that benefit from optimizations; the others dequantize weights for every product.
COMPUTED_FAST = (Quantization.NONE, Quantization.TORCHAO_FLOAT8_DYNAMIC)


# Loaded share of a model when its files are known by their content, when they are read, and when they are in memory.
_DIGESTED, _READ, _COPIED = 0.2, 0.8, 0.95


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load and how. `models` are specs by name (see `catalog.choose_models`); `hub` downloads missing ones.

    `digests` identify weights, and `cpu_dtypes` chooses the dtype on a CPU. With `mapped`, weights stay memory-mapped,
    those of 16 bits also where fp32 is computed. `lora_dir`, or the shared `loras`, holds the LoRAs that requests may
    name, `embeddings` and `controlnets` what else, `image_prompts` what reads their image prompts. `controlnet_lora` is
    added to the ControlNet and `dfloat11` are compressed weights, for models that take them. `offload` and `quantize`
    override what free memory decides; `performance` names the optimizations of resident, unquantized weights.
    `attention_slicing`, `vae_slicing` and `vae_tiling` save memory and change images slightly. Each model caches up to
    `prompt_cache_bytes` of prompt embeddings.

    `on_demand` names the models that are loaded when a request needs them; `pinned` ones are not unloaded for others.
    `memory` is the number of bytes that the weights of all models may take; without it, the free memory decides, less
    what the work needs: images of up to `largest_pixels`, and up to `max_batch` of them at a time. `shares` are shares
    of `free_at_start`, the device's free memory, that models may take; `turn` is what drawing with a loaded model
    takes. `report` receives the loaded share of a model, `on_loaded` the spec of a
    model that was loaded on demand, `on_failed` the name of one whose files cannot be used, with the reason.
    """

    models: Mapping[str, ModelSpec] = field(default_factory=lambda: MODELS)
    hub: HubClient | None = None
    digests: WeightDigests = field(default_factory=WeightDigests)
    cpu_dtypes: CpuDtypes = field(default_factory=CpuDtypes)
    mapped: bool = False
    lora_dir: Path | None = None
    loras: LoraFolder | None = None
    embeddings: EmbeddingFolder | None = None
    image_prompts: ImagePromptFolder = field(default_factory=ImagePromptFolder)
    controlnets: ControlNetFolder | None = None
    controlnet_lora: str = ""
    dfloat11: str = ""
    offload: Offload = "auto"
    quantize: Quantize = "auto"
    performance: str = "off"
    attention_slicing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    prompt_cache_bytes: int = LIMIT_BYTES
    on_demand: Collection[str] = ()
    pinned: Collection[str] = ()
    memory: int | None = None
    largest_pixels: int = 1024 * 1024
    max_batch: int = 1
    shares: Mapping[str, float] = field(default_factory=dict)
    free_at_start: int | None = None
    turn: int = 0
    report: Callable[[float], None] = ignore_progress
    on_loaded: Callable[[ModelSpec], None] = lambda spec: None
    on_failed: Callable[[str, str], None] = lambda model, why: None

    @property
    def loads_on_demand(self) -> bool:
        """Whether models are loaded and unloaded while the engine runs; then they are not traced."""
        return bool(self.on_demand) or self.memory is not None

    @property
    def work(self) -> Workload:
        """The largest work that requests may ask for."""
        return Workload(self.largest_pixels, self.max_batch)

    @property
    def lora_folder(self) -> LoraFolder:
        """The folder of LoRAs."""
        return self.loras or LoraFolder(self.lora_dir)


@dataclass(slots=True)
class PlacedModel:
    """A loaded and placed model. `spec` has the revision of its files, `commit` is that of its hub repository.

    `remarks` are sentences on what could not be loaded.
    """

    spec: ModelSpec
    pipeline: Any
    controlnet: Any
    loras: LoraManager
    placement: Placement
    cuda_graphs: list[CudaGraphRunner] = field(default_factory=list)
    commit: str = ""
    remarks: list[str] = field(default_factory=list)
    tiling: VaeTiling = WHOLE


def measure_model(spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> MeasuredModel:
    """What a model needs on a device, from its configurations or file headers; its spec has the dtype of this device.

    Raises `ModelLoadError`.
    """
    storage = _storage(spec, device, options, _quantize(spec, options))
    parts = empty_pipeline(spec, models_dir, hub=options.hub, storage=storage)
    if device.type == "cpu":
        spec = options.cpu_dtypes.choose(spec, parts)
    measured = MeasuredModel.of(spec, parts, models_dir, device, options.lora_folder, options.hub)
    measured = replace(measured, adapters=measured.adapters + options.image_prompts.largest_bytes(spec))
    return measured.tiled(total_memory(device), options.work, **placement_settings(spec, device, options))


def placement_settings(spec: ModelSpec, device: torch.device, options: LoadOptions) -> dict[str, Any]:
    """What `placement.place` has to follow: the owner's spec comes before OFFLOAD and QUANTIZE."""
    offload, quantize = spec.offload or options.offload, _quantize(spec, options)
    return {"accelerated": device.type != "cpu", "offload": offload, "quantize": quantize}


def _quantize(spec: ModelSpec, options: LoadOptions) -> str:
    return spec.quantize or options.quantize


def _storage(spec: ModelSpec, device: torch.device, options: LoadOptions, quantize: str) -> WeightStorage:
    """What stays packed in the memory of a CPU."""
    if device.type != "cpu":
        return UNPACKED
    return WeightStorage(options.mapped, spec.quantizable_parts if quantize == Quantization.INT8 else ())


def place_model(spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> PlacedModel:
    """A model's pipeline, ControlNet and LoRAs, in the placement that fits the device's free memory.

    Raises `ModelLoadError`. A ControlNet that cannot be used is left out, with a remark.
    """
    hub = options.hub
    measured = measure_model(spec, models_dir, device, options)
    spec = measured.spec
    share = options.shares.get(spec.name)
    most = None if share is None or options.free_at_start is None else int(share * options.free_at_start)
    room = MemoryRoom.now(device, turn=options.turn, most=most)
    placement, remark = measured.place(room, options.work, **placement_settings(spec, device, options))
    always = [(lcm_file(spec, folder, models_dir, hub=hub), weight) for folder, weight in spec.builtin_loras]
    own = model_files(spec, models_dir, hub=hub) if spec.checkpoint is None else checkpoint_files(spec, models_dir)
    files = own | added_files(spec, models_dir) | {f"always/{number}": file for number, (file, _) in enumerate(always)}
    weights = options.digests.of(files, lambda share: options.report(_DIGESTED * share))
    pipeline = load_pipeline(
        spec,
        models_dir,
        device,
        hub=hub,
        move=False,
        report=lambda share: options.report(_DIGESTED + (_READ - _DIGESTED) * share),
        storage=_storage(spec, device, options, placement.quantization),
    )
    remarks = [remark] if remark else []
    if estimated := [name for name, need in measured.model.working_bytes.items() if need.estimated]:
        remarks.append(f"The memory that {' and '.join(estimated)} of {spec.name} need to draw is estimated.")
    controlnet, control = _control(spec, models_dir, device, options, pipeline, placement, remarks)
    if options.digests.of(files) != weights:
        raise ModelLoadError(f"The files in {spec.folder} were changed while they were loaded; start again.")
    known = spec if _quantize(spec, options) != "auto" else with_quantization(spec, placement.quantization)
    known = with_weights(known, weights, control)
    if controlnet is None:
        known = replace(known, control_folder=None)
    parts = {**pipeline.components, CONTROL: controlnet}
    there = [parts.get(name) for name in spec.quantizable_parts]
    plain = [part for part in there if part is not None and not is_packed(part)]
    quantize_parts(plain, placement.quantization, device)
    if spec.takes_dfloat11 and options.dfloat11:
        load_dfloat11(pipeline.transformer, options.dfloat11, device)
    if not options.mapped and (device.type == "cpu" or placement.residency is not Residency.RESIDENT):
        copy_out_of_files(part for part in parts.values() if isinstance(part, torch.nn.Module))
    try:
        adapters = LoraManager(pipeline, options.lora_folder, always)  # on the layers that quantization made
    except InvalidInput as error:  # a built-in LoRA, not a request's
        raise ModelLoadError(error.detail) from error
    options.report(_COPIED)
    apply_residency(pipeline, controlnet, device, placement.residency)
    commit = hub.commit(spec.repo) if hub and spec.repo else ""
    graphs = _optimize(pipeline, getattr(pipeline, spec.denoiser_part), controlnet, device, placement, options)
    return PlacedModel(known, pipeline, controlnet, adapters, placement, graphs, commit, remarks, measured.tiling)


def _control(
    spec: ModelSpec,
    models_dir: Path,
    device: torch.device,
    options: LoadOptions,
    pipeline: Any,
    placement: Placement,
    remarks: list[str],
) -> tuple[Any, str]:
    """The ControlNet with CONTROLNET_LORA, and the digest of both; `None` and an empty digest without one."""
    hub = options.hub
    if spec.control_folder and spec.control_shares_layers and placement.residency is not Residency.RESIDENT:
        remarks.append(f"{spec.name} draws without its ControlNet: its layers are the model's, which do not stay here.")
        return None, ""
    try:
        controlnet = load_controlnet(spec, models_dir, device, hub=hub, move=False)
        if controlnet is None:
            return None, ""
        files = control_files(spec, models_dir, hub=hub)
        check_controlnet(spec.control_folder or "", pipeline, controlnet)
        if hasattr(pipeline, "unet"):
            check_grid(controlnet, pipeline.vae_scale_factor)
    except ModelLoadError as error:
        _log.warning("a ControlNet cannot be used", model=spec.name, folder=spec.control_folder, why=error.detail)
        remarks.append(f"{spec.name} draws without its ControlNet: {error.detail}")
        return None, ""
    if spec.takes_controlnet_lora and options.controlnet_lora:
        lora = lora_file(options.controlnet_lora, models_dir, hub=hub)
        add_to_controlnet(controlnet, lora)
        files = {**files, "lora": lora}
    return controlnet, options.digests.of(files)


def _optimize(
    pipeline: Any, denoiser: Any, controlnet: Any, device: torch.device, placement: Placement, options: LoadOptions
) -> list[CudaGraphRunner]:
    """Apply the optimizations of the settings; the CUDA graph runners that were created."""
    graphs: list[CudaGraphRunner] = []
    packed, on_cpu = is_packed(denoiser), device.type == "cpu"
    fast = on_cpu if packed else placement.quantization in COMPUTED_FAST
    if placement.residency == Residency.RESIDENT and fast:
        graphs = apply_optimizations(
            pipeline,
            controlnet,
            device,
            options.performance,
            traced=not options.loads_on_demand and not packed,
        )
    if on_cpu and Optimization.ONEDNN in optimizations_of(options.performance):
        _multiply_by_onednn([*pipeline.components.values(), controlnet])
    if options.attention_slicing:
        pipeline.enable_attention_slicing()
    vae: Any = getattr(pipeline, "vae", None)
    if options.vae_slicing and hasattr(vae, "use_slicing"):
        vae.enable_slicing()
    if options.vae_tiling and hasattr(vae, "use_tiling"):
        vae.enable_tiling()
    return graphs


def _multiply_by_onednn(parts: Iterable[Any]) -> None:
    """Let packed layers compute in fp32 as the others do."""
    for part in parts:
        if isinstance(part, torch.nn.Module) and part.dtype == torch.float32:
            for layer in part.modules():
                if isinstance(layer, PackedLinear):
                    layer.multiply = linear
