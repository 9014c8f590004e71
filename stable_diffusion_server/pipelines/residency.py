"""The models in memory: loads them on demand within a budget, and unloads the least recently used."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import structlog
import torch

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.family import LoadedFamily
from stable_diffusion_server.pipelines.loading.footprint import return_memory
from stable_diffusion_server.pipelines.loading.placement import (
    CONTROL,
    Footprint,
    Placement,
    Quantization,
    Residency,
    gigabytes,
)
from stable_diffusion_server.pipelines.loading.shared_weights import share_equal_weights, storages_of
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_log = structlog.get_logger(__name__)

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The bytes that the weights of all models may take. `measured`: it follows from the free memory.

    A measured budget also holds what drawing takes, by one model at a time. It is an estimate: a model that exceeds it
    alone is tried, and placed as the memory allows.
    """

    limit: int
    measured: bool = True


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """Bytes that a model takes on the device: its `weights` at rest, and in a `turn` of drawing so many more.

    Of those, `moved` are for weights that wait elsewhere. With less than the `least`, it cannot be placed at all.
    """

    weights: int
    turn: int = 0
    moved: int = 0
    least: int = 0

    @classmethod
    def of(cls, footprint: Footprint, least: int = 0) -> ModelNeed:
        """The need of a model whose weights all stay on the device."""
        return cls(footprint.at_rest(Residency.RESIDENT), footprint.in_turn(Residency.RESIDENT), least=least)


def _load_nothing(spec: ModelSpec, progress: Progress) -> LoadedFamily:
    raise ModelLoadError(f"{spec.name} is not loaded on demand here.")


class ResidentModels:
    """The models of a device: `specs` of all by name, and the loaded ones in the order of their last use.

    `load` loads one, `measure` returns what it needs without loading it. `pinned` models are not unloaded for others,
    and `free` returns the bytes that are really free. The engine's thread changes it; `is_loaded`, `has_room_for` and
    `count_tokens` may be called from any.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        budget: MemoryBudget = MemoryBudget(0),
        load: Callable[[ModelSpec, Progress], LoadedFamily] = _load_nothing,
        measure: Callable[[ModelSpec], ModelNeed] = lambda spec: ModelNeed(0),
        pinned: Collection[str] = (),
        free: Callable[[], int] = lambda: sys.maxsize,
    ) -> None:
        self.specs = dict(specs)
        self.budget = budget
        self.pinned = frozenset(pinned)
        self.loading: tuple[str, float] | None = None
        self._load = load
        self._measure = measure
        self._free = free
        self._loaded: OrderedDict[str, LoadedFamily] = OrderedDict()
        self._storages: dict[str, dict[tuple[str, int], int]] = {}
        self._needs: dict[str, ModelNeed] = {}
        # Models that did not fit into the free memory beside busy ones, although they were expected to.
        self._crowded: set[str] = set()
        self._counters: dict[str, Callable[[str], int]] = {}

    def __getitem__(self, model: str) -> LoadedFamily:
        """A loaded model, which becomes the most recently used."""
        family = self._loaded[model]
        self._loaded.move_to_end(model)
        return family

    @property
    def loaded(self) -> tuple[LoadedFamily, ...]:
        """The loaded models, in the order of their specs."""
        loaded = dict(self._loaded)
        return tuple(loaded[name] for name in self.specs if name in loaded)

    def is_loaded(self, model: str) -> bool:
        """Whether a model is in memory."""
        return model in self._loaded

    def bytes_used(self, models: Collection[str] | None = None) -> int:
        """Bytes of the weights of some loaded models, or of all, that stay on the device; shared memory counts once."""
        storages = dict(self._storages)
        chosen = storages if models is None else [model for model in models if model in storages]
        return sum({place: size for model in chosen for place, size in storages[model].items()}.values())

    def batch_pixels(self, model: str) -> int:
        """The most pixels of all images in a forward pass that a model has memory for. From any thread."""
        family = self._loaded.get(model)
        return sys.maxsize if family is None or family.placement is None else family.placement.batch_pixels

    @property
    def turn(self) -> int:
        """The most bytes that drawing with one of the loaded models takes on the device."""
        return max((self.need_of(name).turn for name in [*self._loaded]), default=0)

    def need_of(self, model: str) -> ModelNeed:
        """What a model needs, as measured last; the bytes of its files before that."""
        known = self._needs.get(model)
        return ModelNeed(self.specs[model].file_bytes if model in self.specs else 0) if known is None else known

    def measure(self, model: str) -> ModelNeed:
        """What a model needs, from its configurations or headers. Raises `ModelLoadError`."""
        need = self._needs.get(model)
        if need is None:
            self._needs[model] = need = self._measure(self.specs[model])
        return need

    def has_room_for(self, model: str, busy: Collection[str] | None) -> bool:
        """Whether a model fits beside the `busy` and the pinned ones; with `None`, beside all loaded ones.

        True if none is busy, so that `load` says why it does not fit.
        """
        if model in self._crowded:
            return not any(busy is None or name in busy for name in [*self._loaded])
        stay = [*self._loaded] if busy is None else [name for name in [*self._loaded] if self._stays(name, busy)]
        if busy is not None and not any(name in busy for name in stay):
            return True
        return self._fits(stay, self.need_of(model))

    def load(self, model: str, busy: Collection[str], progress: Progress) -> bool:
        """Load a model, after unloading others that are neither `busy` nor pinned, if it needs their memory.

        Returns false if it does not fit until the busy ones are done. Raises `ModelLoadError`.
        """
        if self.is_loaded(model):
            return True
        spec = self.specs.get(model)
        if spec is None:
            raise ModelLoadError(f"{model} is not in MODELS_DIR any more.")
        need = self.measure(model)
        stay = [name for name in self._loaded if self._stays(name, busy)]
        if not self._fits(stay, need):
            if any(name in busy for name in stay):
                return False
            if stay or not self.budget.measured:
                raise ModelTooLarge(self._too_large(model, need, stay))
        self._check_unloading_helps(model, need, stay)
        while self._loaded and not self._fits([*self._loaded], need) and self._unload_oldest(busy):
            pass

        def report(share: float) -> None:
            self.loading = (model, share)
            progress(share)

        self._crowded.discard(model)
        try:
            self.add(self._load_with_room(spec, busy, report))
        except BaseException as error:
            return_memory()  # what was loaded of it
            if not isinstance(error, ModelTooLarge) or not any(name in busy for name in self._loaded):
                raise
            self._crowded.add(model)  # tried again when the busy ones are done
        finally:
            self.loading = None
        return self.is_loaded(model)

    def add(self, family: LoadedFamily) -> None:
        """Keep a loaded model, whose weights share the memory of equal weights of other models."""
        name = family.spec.name
        freed = share_equal_weights(family.networks, [other.networks for other in self._loaded.values()])
        if freed:
            _log.info("weights are shared with other models", model=name, bytes=freed)
        self._storages[name] = storages_of(_at_rest(family))
        placement = family.placement or Placement(Residency.RESIDENT, Quantization.NONE, 0)
        self._needs[name] = ModelNeed(self.bytes_used([name]), placement.turn, placement.moved)
        self._counters[name] = family.token_counter or (lambda prompt: family.family.count_tokens(prompt))
        self._loaded[name] = family

    def unload(self, model: str) -> None:
        """Free a model: its weights, graphs, cached prompts and adapters."""
        family = self._loaded.pop(model, None)
        self._storages.pop(model, None)
        if family is None:
            return
        _log.info("a model is unloaded", model=model)
        if family.offloaded is not None:
            family.offloaded.release()
        for graphs in family.cuda_graphs:
            graphs.clear()
        del family
        return_memory()

    def replace_specs(self, specs: Mapping[str, ModelSpec]) -> None:
        """Take other models than before as the ones that can be loaded; the loaded ones stay. From any thread."""
        changed = [name for name, spec in specs.items() if self.specs.get(name) != spec]
        for name in [name for name in [*self._needs] if name not in specs or name in changed]:
            if name not in self._loaded:
                self._needs.pop(name, None)
        self.pinned = frozenset(name for name, spec in specs.items() if spec.pinned)
        self.specs = dict(specs)

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in the tokens of a model that is, or was, loaded. Thread-safe."""
        return self._counters[model](prompt)

    def _load_with_room(self, spec: ModelSpec, busy: Collection[str], progress: Progress) -> LoadedFamily:
        """Load a model; unload others one by one while the memory that is really free does not hold it."""
        while True:
            try:
                return self._load(spec, progress)
            except ModelTooLarge:
                if not self._unload_oldest(busy):
                    raise
            except (torch.OutOfMemoryError, MemoryError) as error:
                if not self._unload_oldest(busy):
                    need = gigabytes(self.need_of(spec.name).weights)
                    raise ModelTooLarge(f"{spec.name} needs {need} for its weights, which are not free.") from error

    def _check_unloading_helps(self, model: str, need: ModelNeed, stay: Collection[str]) -> None:
        """Raise `ModelTooLarge` before other models are unloaded for one that has no room without them either."""
        if len(stay) < len(self._loaded):
            room = self._free() + self.bytes_used() - self.bytes_used(stay)
            if need.least > room:
                raise ModelTooLarge(
                    f"{model} needs {gigabytes(need.least)} of memory at least, and {gigabytes(room)} are free without "
                    "the models that can be unloaded."
                )

    def _unload_oldest(self, busy: Collection[str]) -> bool:
        """Unload the least recently used model that may be; false if there is none."""
        oldest = next((name for name in self._loaded if not self._stays(name, busy)), None)
        if oldest is not None:
            self.unload(oldest)
        return oldest is not None

    def _stays(self, model: str, busy: Collection[str]) -> bool:
        return model in busy or model in self.pinned

    def _fits(self, stay: Collection[str], need: ModelNeed) -> bool:
        """Whether a model fits beside loaded ones."""
        needs = [need, *(self.need_of(name) for name in stay)]
        turn = max(one.turn if self.budget.measured else one.moved for one in needs)
        return self.bytes_used(stay) + need.weights + turn <= self.budget.limit

    def _too_large(self, model: str, need: ModelNeed, stay: Collection[str]) -> str:
        limit = f"MODEL_MEMORY allows {gigabytes(self.budget.limit)}"
        drawing = f" and {gigabytes(need.turn)} to draw" if self.budget.measured else ""
        kept = f", of which {gigabytes(self.bytes_used(stay))} hold pinned models" if stay else ""
        return f"{model} needs {gigabytes(need.weights)} for its weights{drawing}, and {limit}{kept}."


def _at_rest(family: LoadedFamily) -> list[torch.nn.Module]:
    """The networks that stay on the device between requests; of an offloaded model, at most the ControlNet."""
    if family.offloaded is None or family.placement is None:
        return [*family.networks.values()]
    stays = family.placement.residency is not Residency.GROUP
    return [network for name, network in family.networks.items() if stays and name == CONTROL]
