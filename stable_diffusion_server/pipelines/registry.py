"""Which family answers a job: loads every family and hands each state to its own. The only door for `app`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import DoesNotFit, InvalidInput, WeightsUnusable
from stable_diffusion_server.orders import Job
from stable_diffusion_server.pipelines.adapters import Adapters, add_to_controlnet
from stable_diffusion_server.pipelines.catalog import MODELS, ModelFacts
from stable_diffusion_server.pipelines.components import (
    bytes_of,
    choose_device,
    dtype_of,
    footprint_of,
    lcm_file,
    load_controlnet,
    load_pipeline,
    lora_file,
    quieten_libraries,
    settle,
    skeleton,
)
from stable_diffusion_server.pipelines.conversion import compress, quantize_parts
from stable_diffusion_server.pipelines.denoising import Drawn, Family, State
from stable_diffusion_server.pipelines.embeddings import LIMIT_BYTES, Embeddings
from stable_diffusion_server.pipelines.graphs import Graphs
from stable_diffusion_server.pipelines.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.memory import free_memory, memory_of
from stable_diffusion_server.pipelines.performance import speed_up
from stable_diffusion_server.pipelines.placement import (
    CONTROL,
    Offload,
    Placement,
    Quantization,
    Quantize,
    Residency,
    place,
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load and how: `models` by family (see `catalog.choose_models`), from the hub too if `hub`.

    Where the device cannot hold one of them and `instead` has another of its name, that one is loaded. `lora_dir` holds
    the adapters a job may name, or `loras`, where the folder is looked after by others too; `controlnet_lora` goes on
    Flux's ControlNet, the weights `dfloat11` into its transformer. `offload` and `quantize` force what else follows
    from free memory; `performance` is how weights that stay on the device, as they were loaded, are made to compute.
    The VAE may decode a batch one by one (`vae_slicing`) or a large picture in overlapping tiles (`vae_tiling`), which
    takes less memory and changes such pictures a little; so does attention computed in slices. Each model keeps up to
    `prompt_cache_bytes` of encoded prompts.
    """

    models: Mapping[str, ModelFacts] = field(default_factory=lambda: MODELS)
    instead: Mapping[str, ModelFacts] = field(default_factory=dict)
    hub: bool = False
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as it was loaded, for people: from where, on what, in which placement; `bytes` of all its weights."""

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


# Weights in other types are turned into the loaded one for every product, which no layout or compiler makes fast.
COMPUTED_FAST = (Quantization.NONE, Quantization.TORCHAO_FLOAT8_DYNAMIC)


class _Placed(NamedTuple):
    pipeline: Any
    controlnet: Any
    adapters: Adapters
    placement: Placement
    graphs: list[Graphs]


class Registry:
    """All loaded families behind one face: what the engine calls its denoiser.

    `loaded` tells what is there, `models` the facts of each model as it was loaded, `adaptable` whether jobs may name
    adapters. `resident` is false when weights travel between drawings: then many joins thrash, and an engine does well
    to prepare, step and finish in phases.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        loaded: Sequence[Loaded] = (),
        models: Mapping[str, ModelFacts] | None = None,
        caches: Mapping[str, Embeddings] | None = None,
        graphs: Sequence[Graphs] = (),
        *,
        adaptable: bool = False,
    ) -> None:
        self._families = families
        self._adaptable = adaptable
        self.loaded = tuple(loaded)
        self.models = dict(models or {})
        self._caches = dict(caches or {})
        self._graphs = tuple(graphs)
        self._threads = torch.get_num_threads()
        self.resident = all(model.residency == Residency.RESIDENT for model in loaded)

    def prepare(self, job: Job) -> State[Any]:
        """The job's state before its first step."""
        return self._families[job.model].prepare(job)

    def step(self, states: Sequence[State[Any]]) -> None:
        """One denoising step for states of one shape, and so of one family."""
        self._families[states[0].job.model].step(states)

    def finish(self, state: State[Any]) -> Drawn:
        """The picture of a state that is done."""
        return self._families[state.job.model].finish(state)

    def preview(self, state: State[Any]) -> NDArray[np.uint8]:
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
    def best_lanes(self) -> int:
        """Two on a CPU of several cores, where no job may change the weights: small tensors gain less by threads.

        Measured on two cores: 1.5 times the pictures a second (benchmarks/results/).
        """
        return 2 if self.cpu_threads > 1 and not self._adaptable and not self.unshareable else 1

    @property
    def cpu_threads(self) -> int:
        """How many threads of the CPU compute, 0 where another device does."""
        return self._threads if all(model.device == "cpu" for model in self.loaded) else 0

    def enter_lane(self, lanes: int) -> None:
        """Divide the CPU's threads between the lanes; PyTorch counts them for each thread that draws."""
        torch.set_num_threads(max(1, self._threads // lanes))

    def shrink(self) -> bool:
        """Decode in smaller tiles from now on; false when they are as small as they may be."""
        shrunk = [family.shrink() for family in self._families.values()]  # each of them, so no short cut
        return any(shrunk)

    def release_memory(self) -> None:
        """Give back what the allocators and the recordings hold and no drawing uses."""
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

    Raises `WeightsUnusable` with a sentence saying why not. Call it on the thread that will draw: PyTorch's number of
    threads is set for it.
    """
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    device = choose_device(device_name)
    options = options or LoadOptions()
    options = replace(options, loras=options.adapters)
    kinds = _kinds()
    families, loaded, models, caches = {}, [], {}, {}
    graphs: list[Graphs] = []
    for name, wanted in options.models.items():
        facts, placed = _place_or_instead(wanted, models_dir, device, options)
        pipeline, controlnet, adapters, placement, replayed = placed
        graphs += replayed
        models[name] = facts
        caches[name] = Embeddings(options.prompt_cache_bytes)
        families[name] = kinds[facts.pipeline_class](pipeline, facts, controlnet, adapters, caches[name])
        modules = [part for part in [*pipeline.components.values(), controlnet] if isinstance(part, torch.nn.Module)]
        loaded.append(
            Loaded(
                name=name,
                folder=facts.folder,
                revision=facts.revision,
                device=str(device),
                dtype=str(dtype_of(facts, device)).removeprefix("torch."),
                residency=placement.residency,
                quantization=placement.quantization,
                bytes=bytes_of(*modules),
                follows_edges=controlnet is not None,
                loras=options.adapters.names({facts.denoiser}),
            )
        )
    registry = Registry(families, loaded, models, caches, graphs, adaptable=options.adapters.folder is not None)
    if not registry.resident:
        # Memory is given back after every turn then, and recordings with it.
        for recorded in graphs:
            recorded.give_up()
    return registry


def _place_or_instead(
    facts: ModelFacts, models_dir: Path, device: torch.device, options: LoadOptions
) -> tuple[ModelFacts, _Placed]:
    """The model, or the one that is loaded instead where the device cannot hold it."""
    try:
        return facts, _place_model(facts, models_dir, device, options)
    except DoesNotFit as error:
        other = options.instead.get(facts.name)
        if other is None or other == facts:
            raise
        _log.warning(
            "other weights are used", model=facts.name, wanted=facts.folder, used=other.folder, why=error.detail
        )
        return other, _place_model(other, models_dir, device, options)


def _place_model(facts: ModelFacts, models_dir: Path, device: torch.device, options: LoadOptions) -> _Placed:
    """A model's pipeline, ControlNet and adapters, in the placement that fits the device's free memory now."""
    hub = options.hub
    footprint = footprint_of(facts, skeleton(facts, models_dir, hub=hub), dtype_of(facts, device))
    placement = place(
        free_memory(device),
        footprint,
        accelerated=device.type != "cpu",
        offload=options.offload,
        quantize=options.quantize,
    )
    pipeline = load_pipeline(facts, models_dir, device, hub=hub, move=False)
    controlnet = load_controlnet(facts, models_dir, device, hub=hub, move=False)
    if facts.name == "flux" and controlnet is not None and options.controlnet_lora:
        add_to_controlnet(controlnet, lora_file(options.controlnet_lora, models_dir, hub=hub))
    always = [(lcm_file(facts, folder, models_dir, hub=hub), weight) for folder, weight in facts.always]
    try:
        adapters = Adapters(
            pipeline, options.adapters, always, lambda: settle(pipeline, controlnet, device, placement.residency)
        )
    except InvalidInput as error:  # of no request here
        raise WeightsUnusable(error.detail) from error
    parts = {**pipeline.components, CONTROL: controlnet}
    quantize_parts([parts[name] for name in facts.quantized if parts[name] is not None], placement.quantization)
    if facts.name == "flux" and options.dfloat11:
        compress(pipeline.transformer, options.dfloat11, device)
    settle(pipeline, controlnet, device, placement.residency)
    graphs: list[Graphs] = []
    if placement.residency == Residency.RESIDENT and placement.quantization in COMPUTED_FAST:
        graphs = speed_up(pipeline, controlnet, device, options.performance, steady=options.adapters.folder is None)
    if options.attention_slicing:
        pipeline.enable_attention_slicing()
    if options.vae_slicing:
        pipeline.vae.enable_slicing()
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    return _Placed(pipeline, controlnet, adapters, placement, graphs)


def _kinds() -> Mapping[str, Callable[[Any, ModelFacts, Any, Adapters, Embeddings], Family]]:
    """Each family by the stock pipeline it draws with."""
    quieten_libraries()
    # Imported behind it: what they bring along remarks on packages that are not needed here.
    from stable_diffusion_server.pipelines.flux import Flux
    from stable_diffusion_server.pipelines.sdxl import Sdxl

    return {"StableDiffusionXLPipeline": Sdxl, "FluxPipeline": Flux}
