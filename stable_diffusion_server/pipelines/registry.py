"""Loads the models of the catalogue and passes each request to the family of its model."""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.base import DecodedImage, PipelineState
from stable_diffusion_server.pipelines.family import FamilyClass, LoadedFamily, LoadedModelInfo
from stable_diffusion_server.pipelines.loading.components import quieten_libraries
from stable_diffusion_server.pipelines.loading.footprint import choose_device, memory_of
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.pipelines.loading.placement import Residency
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.types import DiffusionRequest

__all__ = ["LoadOptions", "LoadedFamily", "LoadedModelInfo", "Registry", "load"]

_log = structlog.get_logger(__name__)


class Registry:
    """The loaded families, by model name: what the engine uses as its denoiser.

    `loaded` describes the models, `models` holds their specs as they were loaded, and `unusable` says in a sentence why
    another model was not loaded. With `dynamic_loras`, requests may name LoRAs, so weights change between requests.
    `resident` is false when weights move between memory and device; the engine then prepares, steps and finishes in
    phases, since every join would move weights.
    """

    def __init__(
        self,
        families: Sequence[LoadedFamily] = (),
        *,
        dynamic_loras: bool = False,
        unusable: Mapping[str, str] | None = None,
    ) -> None:
        self._families = {loaded.spec.name: loaded.family for loaded in families}
        self._dynamic_loras = dynamic_loras
        self.loaded = tuple(loaded.info for loaded in families)
        self.models = {loaded.spec.name: loaded.spec for loaded in families}
        self.unusable = dict(unusable or {})
        caches = {loaded.spec.name: loaded.prompt_cache for loaded in families}
        self._prompt_caches = {name: cache for name, cache in caches.items() if cache is not None}
        self._cuda_graphs = [runner for loaded in families for runner in loaded.cuda_graphs]
        offloaded = {loaded.spec.name: loaded.offloaded for loaded in families}
        self._offloaded = {name: model for name, model in offloaded.items() if model is not None}
        self._model_on_device = ""
        self._threads = torch.get_num_threads()
        self.resident = all(info.residency == Residency.RESIDENT for info in self.loaded)

    def prepare(self, request: DiffusionRequest) -> PipelineState[Any]:
        """The state of a request before its first step."""
        with self._only(request.model, "text_encoder", "text_encoder_2"):
            return self._families[request.model].prepare(request)

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One denoising step for states of one shape, hence of one model."""
        model = states[0].request.model
        with self._only(model, "unet", "transformer"):
            self._families[model].step(states)

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """The image of a state that is done."""
        with self._only(state.request.model, "vae"):
            return self._families[state.request.model].finish(state)

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small image of the state, made without decoding: height × width × 3."""
        return self._families[state.request.model].preview(state)

    def _only(self, model: str, *parts: str) -> AbstractContextManager[None]:
        """Run a block with only these components of a model on the device, if its weights move."""
        for name, other in self._offloaded.items():
            if name != model and self._model_on_device != model:
                other.release()
        self._model_on_device = model
        offloaded = self._offloaded.get(model)
        return nullcontext() if offloaded is None else offloaded.only(*parts)

    @property
    def unshareable(self) -> str:
        """Why several engine threads cannot run at once, as a sentence; empty if they can."""
        if not self.resident:
            return "the weights travel between memory and device."
        if any(model.dtype != "float32" for model in self.loaded):
            return "weights in half precision change theirs to decode what overflows."
        if self._cuda_graphs:
            return "what is recorded as a CUDA graph has one place for its inputs."
        return ""

    @property
    def best_workers(self) -> int:
        """Recommended number of engine threads: 2 on a CPU of several cores whose weights never change, otherwise 1.

        Small tensors gain little from threads inside an operator: two engine threads generated 1.5 times the
        images per second on two cores (benchmarks/results/).
        """
        return 2 if self.cpu_threads > 1 and not self._dynamic_loras and not self.unshareable else 1

    @property
    def cpu_threads(self) -> int:
        """Number of CPU threads that compute; 0 when another device does."""
        return self._threads if all(model.device == "cpu" for model in self.loaded) else 0

    def enter_worker(self, workers: int) -> None:
        """Divide the CPU threads among the engine threads; each calls this, since PyTorch's setting is per thread."""
        torch.set_num_threads(max(1, self._threads // workers))

    def shrink(self) -> bool:
        """Use less memory from now on; false when no family can."""
        shrunk = [family.shrink() for family in self._families.values()]  # every family, so no short circuit
        return any(shrunk)

    def release_memory(self) -> None:
        """Free what no request uses: offloaded weights, CUDA graphs, allocator caches."""
        for offloaded in self._offloaded.values():
            offloaded.release()
        for runner in self._cuda_graphs:
            runner.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by device: `used` by this process, `reserved` by it from the device, `free` for anyone."""
        return {name: memory_of(torch.device(name)) for name in sorted({model.device for model in self.loaded})}

    def prompt_caches(self) -> dict[str, int]:
        """Bytes of cached prompt embeddings, by model."""
        return {name: cache.bytes for name, cache in self._prompt_caches.items()}

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Thread-safe."""
        return self._families[model].count_tokens(prompt)


def load(models_dir: Path, device_name: str, cpu_threads: int, options: LoadOptions | None = None) -> Registry:
    """Load the models of `options` (by default the embedded ones) onto one device.

    A model that fails to load is left out and `Registry.unusable` says why. Raises `ModelLoadError` with a sentence
    for each when all fail. Call this on the engine's thread: PyTorch's number of threads is set for the calling
    thread.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    device = choose_device(device_name)
    options = options or LoadOptions()
    options = replace(options, loras=options.lora_folder)
    quieten_libraries()  # before a family is imported: the libraries warn about optional packages on import
    families: list[LoadedFamily] = []
    errors: dict[str, ModelLoadError] = {}
    for name, spec in options.models.items():
        try:
            families.append(_load_or_fall_back(spec, models_dir, device, options))
        except ModelLoadError as error:
            errors[name] = error
            _log.error("a model cannot be loaded", model=name, folder=spec.folder, why=error.detail)
    if errors and not families:
        sentences = " ".join(error.detail for error in errors.values())
        raise next(iter(errors.values())) if len(errors) == 1 else ModelLoadError(sentences)
    registry = Registry(
        families,
        dynamic_loras=options.lora_folder.folder is not None,
        unusable={name: error.detail for name, error in errors.items()},
    )
    if not registry.resident:
        # Memory and CUDA graphs are then released after every phase, so recording graphs would not pay off.
        for loaded in families:
            for runner in loaded.cuda_graphs:
                runner.disable()
    return registry


def _load_or_fall_back(spec: ModelSpec, models_dir: Path, device: torch.device, options: LoadOptions) -> LoadedFamily:
    """The model of `spec`, or its fallback when the device cannot hold it. Raises `ModelLoadError`."""
    try:
        return _family_class(spec).load(spec, models_dir, device, options)
    except ModelTooLarge as error:
        fallback = options.fallbacks.get(spec.name)
        if fallback is None or fallback == spec:
            raise
        _log.warning(
            "other weights are used", model=spec.name, wanted=spec.folder, used=fallback.folder, why=error.detail
        )
        return _family_class(fallback).load(fallback, models_dir, device, options)


def _family_class(spec: ModelSpec) -> FamilyClass:
    """The class that a catalogue row names; imported here, so that a new family needs its row and its file only."""
    return cast(FamilyClass, pkgutil.resolve_name(spec.family))
