"""Which family answers a job: loads every family and hands each state to its own. The only door for `app`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.base import DecodedImage, Family, PipelineState
from stable_diffusion_server.pipelines.catalog import ModelSpec
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.loading.components import choose_device, dtype_of, quieten_libraries
from stable_diffusion_server.pipelines.loading.device_memory import memory_of
from stable_diffusion_server.pipelines.loading.footprint import bytes_of
from stable_diffusion_server.pipelines.loading.loader import LoadOptions, PlacedModel, place_or_fall_back
from stable_diffusion_server.pipelines.loading.offload import OffloadedModel
from stable_diffusion_server.pipelines.loading.placement import Residency
from stable_diffusion_server.types import DiffusionRequest

__all__ = ["LoadOptions", "LoadedModelInfo", "Registry", "load"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModelInfo:
    """A model as it was loaded, for people: from where, on what, in which placement; `bytes` of all its weights.

    `commit` is that of its repository where it came from the hub, `remarks` say what it does without.
    """

    name: str
    folder: str
    revision: str
    device: str
    dtype: str
    residency: str
    quantization: str
    bytes: int
    follows_edges: bool
    loras: tuple[str, ...]
    commit: str = ""
    remarks: tuple[str, ...] = ()


class Registry:
    """All loaded families behind one face: what the engine calls its denoiser.

    `loaded` tells what is there, `models` the facts of each model as it was loaded, `unusable` why another one was not;
    `adaptable` whether jobs may name adapters. `resident` is false when weights travel between drawings: then many
    joins thrash, and an engine does well to prepare, step and finish in phases.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        loaded: Sequence[LoadedModelInfo] = (),
        models: Mapping[str, ModelSpec] | None = None,
        caches: Mapping[str, PromptCache] | None = None,
        graphs: Sequence[CudaGraphRunner] = (),
        *,
        adaptable: bool = False,
        offloaded: Mapping[str, OffloadedModel] | None = None,
        unusable: Mapping[str, str] | None = None,
    ) -> None:
        self._families = families
        self._adaptable = adaptable
        self.loaded = tuple(loaded)
        self.models = dict(models or {})
        self.unusable = dict(unusable or {})
        self._caches = dict(caches or {})
        self._graphs = tuple(graphs)
        self._offloaded = dict(offloaded or {})
        self._present = ""
        self._threads = torch.get_num_threads()
        self.resident = all(model.residency == Residency.RESIDENT for model in loaded)

    def prepare(self, job: DiffusionRequest) -> PipelineState[Any]:
        """The job's state before its first step."""
        with self._only(job.model, "text_encoder", "text_encoder_2"):
            return self._families[job.model].prepare(job)

    def step(self, states: Sequence[PipelineState[Any]]) -> None:
        """One denoising step for states of one shape, and so of one family."""
        model = states[0].job.model
        with self._only(model, "unet", "transformer"):
            self._families[model].step(states)

    def finish(self, state: PipelineState[Any]) -> DecodedImage:
        """The picture of a state that is done."""
        with self._only(state.job.model, "vae"):
            return self._families[state.job.model].finish(state)

    def _only(self, model: str, *parts: str) -> AbstractContextManager[None]:
        """A block that has these parts of a model alone on the device, where its weights travel."""
        for name, other in self._offloaded.items():
            if name != model and self._present != model:
                other.release()
        self._present = model
        offloaded = self._offloaded.get(model)
        return nullcontext() if offloaded is None else offloaded.only(*parts)

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """A small picture of where a state stands."""
        return self._families[state.job.model].preview(state)

    @property
    def unshareable(self) -> str:
        """Why threads may not draw side by side, empty where they may."""
        if not self.resident:
            return "the weights travel between memory and device."
        if any(model.dtype != "float32" for model in self.loaded):
            return "weights in half precision change theirs to decode what overflows."
        if self._graphs:
            return "what is recorded as a CUDA graph has one place for its inputs."
        return ""

    @property
    def best_workers(self) -> int:
        """Two on a CPU of several cores, where no job may change the weights: small tensors gain less by threads.

        Measured on two cores: 1.5 times the pictures a second (benchmarks/results/).
        """
        return 2 if self.cpu_threads > 1 and not self._adaptable and not self.unshareable else 1

    @property
    def cpu_threads(self) -> int:
        """How many threads of the CPU compute, 0 where another device does."""
        return self._threads if all(model.device == "cpu" for model in self.loaded) else 0

    def enter_worker(self, lanes: int) -> None:
        """Divide the CPU's threads between the lanes; PyTorch counts them for each thread that draws."""
        torch.set_num_threads(max(1, self._threads // lanes))

    def shrink(self) -> bool:
        """Decode in smaller tiles from now on; false when they are as small as they may be."""
        shrunk = [family.shrink() for family in self._families.values()]  # each of them, so no short cut
        return any(shrunk)

    def release_memory(self) -> None:
        """Give back what the allocators and the recordings hold and no drawing uses; weights that travel go home."""
        for offloaded in self._offloaded.values():
            offloaded.release()
        for graphs in self._graphs:
            graphs.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of memory by device: `used` by this process, `reserved` by it from the device, `free` for anyone."""
        return {name: memory_of(torch.device(name)) for name in sorted({model.device for model in self.loaded})}

    def prompt_caches(self) -> dict[str, int]:
        """Bytes of encoded prompts that are kept, by model."""
        return {name: cache.bytes for name, cache in self._caches.items()}

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Safe from any thread."""
        return self._families[model].count_tokens(prompt)


def load(models_dir: Path, device_name: str, cpu_threads: int, options: LoadOptions | None = None) -> Registry:
    """Load the models of `options`, those that come with the server by default, on one device.

    A model that cannot be loaded costs itself alone: `Registry.unusable` says why. Raises `ModelLoadError` with a
    sentence for each when none can be loaded. Call it on the thread that will draw: PyTorch's number of threads is set
    for it.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    device = choose_device(device_name)
    options = options or LoadOptions()
    options = replace(options, loras=options.adapters)
    placed: dict[str, PlacedModel] = {}
    families: dict[str, Family] = {}
    caches: dict[str, PromptCache] = {}
    errors: dict[str, ModelLoadError] = {}
    kinds = _kinds()
    for name, wanted in options.models.items():
        try:
            model = place_or_fall_back(wanted, models_dir, device, options)
            caches[name] = PromptCache(options.prompt_cache_bytes)
            given = (model.pipeline, model.facts, model.controlnet, model.adapters, caches[name])
            families[name] = kinds[model.facts.pipeline_class](*given)
            placed[name] = model
        except ModelLoadError as error:
            errors[name] = error
            _log.error("a model cannot be loaded", model=name, folder=wanted.folder, why=error.detail)  # it is all
    if errors and not placed:
        sentences = " ".join(error.detail for error in errors.values())
        raise next(iter(errors.values())) if len(errors) == 1 else ModelLoadError(sentences)
    registry = Registry(
        families,
        [_told(name, model, device, options) for name, model in placed.items()],
        {name: model.facts for name, model in placed.items()},
        caches,
        [graphs for model in placed.values() for graphs in model.graphs],
        adaptable=options.adapters.folder is not None,
        offloaded={
            name: OffloadedModel(model.pipeline, model.controlnet, model.placement.residency)
            for name, model in placed.items()
        },
        unusable={name: error.detail for name, error in errors.items()},
    )
    if not registry.resident:
        # Memory is given back after every turn then, and recordings with it.
        for model in placed.values():
            for recorded in model.graphs:
                recorded.give_up()
    return registry


def _told(name: str, placed: PlacedModel, device: torch.device, options: LoadOptions) -> LoadedModelInfo:
    modules = [
        part for part in [*placed.pipeline.components.values(), placed.controlnet] if isinstance(part, torch.nn.Module)
    ]
    facts = placed.facts
    return LoadedModelInfo(
        name=name,
        folder=facts.folder,
        revision=facts.revision,
        device=str(device),
        dtype=str(dtype_of(facts, device)).removeprefix("torch."),
        residency=placed.placement.residency,
        quantization=placed.placement.quantization,
        bytes=bytes_of(*modules),
        follows_edges=placed.controlnet is not None,
        loras=options.adapters.names({facts.denoiser}),
        commit=placed.commit,
        remarks=tuple(placed.remarks),
    )


def _kinds() -> Mapping[str, Callable[[Any, ModelSpec, Any, LoraManager, PromptCache], Family]]:
    """Each family by the stock pipeline it draws with."""
    quieten_libraries()
    # Imported behind it: what they bring along remarks on packages that are not needed here.
    from stable_diffusion_server.pipelines.families.flux import Flux
    from stable_diffusion_server.pipelines.families.sdxl import Sdxl

    return {"StableDiffusionXLPipeline": Sdxl, "FluxPipeline": Flux}
