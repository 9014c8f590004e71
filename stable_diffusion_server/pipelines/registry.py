"""Loads the models of the catalogue and passes each request to the family of its model."""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import ModelChanged, ModelLoadError, ModelStays, ModelTooLarge
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.base import DecodedImage, PipelineState
from stable_diffusion_server.pipelines.family import FamilyClass, LoadedFamily, LoadedModelInfo
from stable_diffusion_server.pipelines.loading.components import quieten_libraries
from stable_diffusion_server.pipelines.loading.cpu_dtype import CpuDtypes
from stable_diffusion_server.pipelines.loading.footprint import choose_device, free_memory, memory_of
from stable_diffusion_server.pipelines.loading.loader import LoadOptions, measure_model, placement_settings
from stable_diffusion_server.pipelines.loading.placement import USABLE, Residency
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.model_spec import REFINER, ModelSpec
from stable_diffusion_server.pipelines.residency import MemoryBudget, ModelNeed, ResidentModels
from stable_diffusion_server.types import DiffusionRequest

__all__ = ["CpuDtypes", "LoadOptions", "LoadedFamily", "LoadedModelInfo", "Registry", "load"]

# Components that prepare a request, and those that take a step.
_ENCODERS = "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"
_DENOISERS = "unet", "transformer", "decoder", REFINER
# Bytes of weights from which one request uses all cores of a CPU well: the embedded models have 60 MB, SDXL 7 GB.
_LARGE = 1_000_000_000

_log = structlog.get_logger(__name__)


class Registry:
    """The models by name: what the engine uses as its denoiser.

    `loaded` describes the loaded models, `models` holds their specs as they were loaded, and `unusable` says in a
    sentence why another model could not be loaded at the start. With `on_demand`, models are loaded and
    unloaded while the engine runs. `resident` is false when weights move between memory and device; the engine then
    prepares, steps and finishes in phases, since every join would move weights.
    """

    def __init__(
        self,
        families: Sequence[LoadedFamily] = (),
        *,
        unusable: Mapping[str, str] | None = None,
        residents: ResidentModels | None = None,
        on_demand: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if residents is None:
            residents = ResidentModels({loaded.spec.name: loaded.spec for loaded in families})
        self.residents = residents
        for loaded in families:
            residents.add(loaded)
        self.on_demand = on_demand
        self.unusable = dict(unusable or {})
        self._device = device
        self._model_on_device = ""
        self._threads = torch.get_num_threads()

    @property
    def loaded(self) -> tuple[LoadedModelInfo, ...]:
        """What is loaded."""
        return tuple(model.info for model in self.residents.loaded)

    @property
    def models(self) -> dict[str, ModelSpec]:
        """The specs of the loaded models by name."""
        return {model.spec.name: model.spec for model in self.residents.loaded}

    @property
    def loading(self) -> tuple[str, float] | None:
        """The model that is being loaded, and its loaded share (0..1)."""
        return self.residents.loading

    @property
    def resident(self) -> bool:
        """Whether the weights of all loaded models stay on the device."""
        return all(info.residency == Residency.RESIDENT for info in self.loaded)

    def is_loaded(self, model: str) -> bool:
        """Whether a model is in memory."""
        return self.residents.is_loaded(model)

    def has_room_for(self, model: str, busy: Collection[str] | None) -> bool:
        """Whether a model fits beside the `busy` ones; with `None`, beside all loaded ones."""
        return self.residents.has_room_for(model, busy)

    def load(self, model: str, busy: Collection[str], progress: Callable[[float], None]) -> bool:
        """Load a model, after unloading others than the `busy` ones; false if there is no room beside these.

        Raises `ModelLoadError`.
        """
        done = self.residents.load(model, busy, progress)
        self._disable_graphs_of_moving_weights()
        return done

    def replace_specs(self, specs: Mapping[str, ModelSpec]) -> None:
        """Take other models than before as the ones that can be loaded."""
        self.residents.replace_specs(specs)

    def unload(self, model: str) -> None:
        """Free a model. Raises `ModelStays` where models are not loaded on demand."""
        if not self.on_demand:
            raise ModelStays(f"{model} stays loaded: what TorchScript traced of it cannot be freed.")
        self.residents.unload(model)

    def prepare(self, request: DiffusionRequest) -> PipelineState[Any]:
        """The state of a request before its first step."""
        loaded = self.residents[request.model]
        if self.on_demand and request.revision not in (loaded.spec.revision, loaded.spec.revision_for(edges=True)):
            raise ModelChanged(f"The files of {request.model} were changed while the request waited; send it again.")
        with self._only(request.model, *_ENCODERS):
            return loaded.family.prepare(request)

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One denoising step for states of one shape, hence of one model."""
        with self._only(model := states[0].request.model, *_DENOISERS):
            self.residents[model].family.step(states)

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """The image of a state that is done."""
        with self._only(state.request.model, "vae"):
            return self.residents[state.request.model].family.finish(state)

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small image of the state, made without decoding: height × width × 3."""
        return self.residents[state.request.model].family.preview(state)

    def _only(self, model: str, *parts: str) -> AbstractContextManager[None]:
        """Run a block with only these components of a model on the device, if its weights move."""
        moving = {loaded.spec.name: loaded.offloaded for loaded in self.residents.loaded}
        if self._model_on_device != model:
            for name, other in moving.items():
                if name != model and other is not None:
                    other.release()
        self._model_on_device = model
        offloaded = moving.get(model)
        return nullcontext() if offloaded is None else offloaded.only(*parts)

    def _disable_graphs_of_moving_weights(self) -> None:
        """Memory and CUDA graphs are released after every phase then, so recording graphs would not pay off."""
        if not self.resident:
            for runner in self._cuda_graphs:
                runner.disable()

    @property
    def _cuda_graphs(self) -> list[CudaGraphRunner]:
        return [runner for loaded in self.residents.loaded for runner in loaded.cuda_graphs]

    @property
    def unshareable(self) -> str:
        """Why several engine threads cannot run at once, as a sentence; empty if they can."""
        if self.on_demand:
            return "models are loaded and unloaded on demand."
        if not self.resident:
            return "the weights travel between memory and device."
        if any(model.dtype != "float32" for model in self.loaded):
            return "weights in half precision change theirs to decode what overflows."
        if self._cuda_graphs:
            return "what is recorded as a CUDA graph has one place for its inputs."
        return ""

    @property
    def best_workers(self) -> int:
        """Recommended number of engine threads: 2 on a CPU of several cores whose weights do not move, otherwise 1.

        Small tensors gain little from threads inside an operator: two engine threads generated 1.5 times the
        images per second on two cores (benchmarks/results/).
        """
        return 2 if self.cpu_threads > 1 and not self.unshareable else 1

    @property
    def cpu_threads(self) -> int:
        """Number of CPU threads that compute; 0 when another device does."""
        devices = {model.device for model in self.loaded} or {str(self._device)}
        return self._threads if devices == {"cpu"} else 0

    def is_large(self, model: str) -> bool:
        """Whether a model's tensors are large enough to be divided among cores, by the bytes of its weights."""
        return self.residents.need_of(model).weights >= _LARGE

    def share_cores(self, shares: int) -> None:
        """Compute with one of so many shares of the CPU threads; PyTorch's setting is that of the calling thread."""
        torch.set_num_threads(max(1, self._threads // shares))

    def batch_limit(self, request: DiffusionRequest) -> int:
        """The most requests of this size in a forward pass that the placement of the model has memory for."""
        shares = self.residents.specs[request.model].batches
        pixels = self.residents.batch_pixels(request.model) if shares else 0
        return max(1, pixels // (request.width * request.height))

    def shrink(self, state: PipelineState[Any]) -> bool:
        """Use less memory for this state from now on; false when its family cannot."""
        return self.residents[state.request.model].family.shrink(state)

    def release_memory(self) -> None:
        """Free what no request uses: offloaded weights, CUDA graphs, allocator caches."""
        for loaded in self.residents.loaded:
            if loaded.offloaded is not None:
                loaded.offloaded.release()
        for runner in self._cuda_graphs:
            runner.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by device: `used` by this process, `reserved` by it from the device, `free` for anyone."""
        devices = {model.device for model in self.loaded} or {str(self._device or "cpu")}
        return {name: memory_of(torch.device(name)) for name in sorted(devices)}

    def prompt_caches(self) -> dict[str, int]:
        """Bytes of cached prompt embeddings, by model."""
        caches = {loaded.spec.name: loaded.prompt_cache for loaded in self.residents.loaded}
        return {name: cache.bytes for name, cache in caches.items() if cache is not None}

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in the tokens of a model that is, or was, loaded. Thread-safe."""
        return self.residents.count_tokens(model, prompt)


def load(models_dir: Path, device_name: str, cpu_threads: int, options: LoadOptions | None = None) -> Registry:
    """Load the models of `options` (by default the embedded ones) onto one device, except those on demand.

    A model that fails to load is left out and `Registry.unusable` says why. Raises `ModelLoadError` with a sentence
    for each when all fail. Call this on the engine's thread: PyTorch's number of threads is set for the calling
    thread.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    device = choose_device(device_name)
    options = options or LoadOptions()
    options = replace(options, loras=options.lora_folder, free_at_start=free_memory(device))
    quieten_libraries()  # before a family is imported: the libraries warn about optional packages on import
    residents = _residents(models_dir, device, options)
    errors: dict[str, ModelLoadError] = {}
    for name in (name for name in options.models if name not in options.on_demand):
        spec = options.models[name]
        try:
            if options.loads_on_demand:  # what does not fit beside the others waits for its first request
                residents.load(name, [other.spec.name for other in residents.loaded], ignore_progress)
            else:
                beside = replace(options, turn=residents.turn)
                residents.add(_family_class(spec).load(spec, models_dir, device, beside))
        except ModelLoadError as error:
            errors[name] = error
            _log.error("a model cannot be loaded", model=name, folder=spec.folder, why=error.detail)
    if errors and not residents.loaded and not options.on_demand:
        sentences = " ".join(error.detail for error in errors.values())
        raise next(iter(errors.values())) if len(errors) == 1 else ModelLoadError(sentences)
    registry = Registry(
        unusable={name: error.detail for name, error in errors.items()},
        residents=residents,
        on_demand=options.loads_on_demand,
        device=device,
    )
    registry._disable_graphs_of_moving_weights()
    return registry


def _residents(models_dir: Path, device: torch.device, options: LoadOptions) -> ResidentModels:
    """The models of `options`, none of them loaded."""
    budget = MemoryBudget(options.memory or 0, measured=False)
    if options.memory is None:
        budget = MemoryBudget(int(USABLE * (options.free_at_start or 0)))

    def load_one(spec: ModelSpec, progress: Callable[[float], None]) -> LoadedFamily:
        try:
            wanted = replace(options, report=progress, turn=residents.turn)
            loaded = _family_class(spec).load(spec, models_dir, device, wanted)
        except ModelTooLarge:  # may fit another time
            raise
        except ModelLoadError as error:
            if is_current(spec):
                options.on_failed(spec.name, error.detail)
            raise
        if not is_current(spec):
            raise ModelChanged(f"The files of {spec.name} were changed while it was loaded; send the request again.")
        options.on_loaded(loaded.spec)
        return loaded

    def is_current(spec: ModelSpec) -> bool:
        """False after MODELS_DIR was read again meanwhile, and has another model of this name or none."""
        return residents.specs.get(spec.name) == spec

    def measure(spec: ModelSpec) -> ModelNeed:
        try:
            measured = measure_model(spec, models_dir, device, options)
            least = measured.least(options.work, **placement_settings(spec, device, options))
            return ModelNeed.of(measured.footprint(replace(options.work, max_batch=1)), least)
        except ModelLoadError as error:
            if is_current(spec):
                options.on_failed(spec.name, error.detail)
            raise

    free = partial(free_memory, device)
    residents = ResidentModels(options.models, budget, load_one, measure, options.pinned, free)
    return residents  # `load_one` reads it


def _family_class(spec: ModelSpec) -> FamilyClass:
    """The class that a catalogue row names; imported here, so that a new family needs its row and its file only."""
    return cast(FamilyClass, pkgutil.resolve_name(spec.family))
