"""The models in memory: loads them on demand within a budget, and unloads the least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import structlog
import torch

from stable_diffusion_server.errors import ModelLoadError, ModelTooLarge
from stable_diffusion_server.pipelines.family import LoadedFamily
from stable_diffusion_server.pipelines.loading.footprint import return_memory
from stable_diffusion_server.pipelines.loading.placement import gigabytes
from stable_diffusion_server.pipelines.loading.shared_weights import share_equal_weights, storages_of
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_log = structlog.get_logger(__name__)

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The bytes that the weights of all models may take. `measured`: it follows from the free memory.

    A measured budget is an estimate: a model that exceeds it alone is tried, and placed as the memory allows.
    """

    limit: int
    measured: bool = True


def _load_nothing(spec: ModelSpec, progress: Progress) -> LoadedFamily:
    raise ModelLoadError(f"{spec.name} is not loaded on demand here.")


class ResidentModels:
    """The models of a device: `specs` of all by name, and the loaded ones in the order of their last use.

    `load` loads one, `measure` returns the bytes of its weights without loading them. `pinned` models are not unloaded
    for others. The engine's thread changes it; `is_loaded`, `has_room_for` and `count_tokens` may be called from any.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        budget: MemoryBudget = MemoryBudget(0),
        load: Callable[[ModelSpec, Progress], LoadedFamily] = _load_nothing,
        measure: Callable[[ModelSpec], int] = lambda spec: 0,
        pinned: Collection[str] = (),
    ) -> None:
        self.specs = dict(specs)
        self.budget = budget
        self.pinned = frozenset(pinned)
        self.loading: tuple[str, float] | None = None
        self._load = load
        self._measure = measure
        self._loaded: OrderedDict[str, LoadedFamily] = OrderedDict()
        self._storages: dict[str, dict[tuple[str, int], int]] = {}
        self._sizes: dict[str, int] = {}
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
        """Bytes of the weights of some loaded models, or of all; shared memory counts once."""
        storages = dict(self._storages)
        chosen = storages if models is None else [model for model in models if model in storages]
        return sum({place: size for model in chosen for place, size in storages[model].items()}.values())

    def size_of(self, model: str) -> int:
        """Bytes of the weights of a model, as measured last; those of its files before it was first loaded."""
        known = self._sizes.get(model)
        return self.specs[model].file_bytes if known is None and model in self.specs else known or 0

    def measure(self, model: str) -> int:
        """Bytes of the weights of a model, from its configurations or headers. Raises `ModelLoadError`."""
        if model not in self._sizes:
            self._sizes[model] = self._measure(self.specs[model])
        return self._sizes[model]

    def has_room_for(self, model: str, busy: Collection[str] | None) -> bool:
        """Whether a model fits beside the `busy` and the pinned ones; with `None`, beside all loaded ones.

        True if none is busy, so that `load` says why it does not fit.
        """
        stay = [*self._loaded] if busy is None else [name for name in [*self._loaded] if self._stays(name, busy)]
        if busy is not None and not any(name in busy for name in stay):
            return True
        return self.bytes_used(stay) + self.size_of(model) <= self.budget.limit

    def load(self, model: str, busy: Collection[str], progress: Progress) -> bool:
        """Load a model, after unloading others that are neither `busy` nor pinned, if it needs their memory.

        Returns false if it does not fit until the busy ones are done. Raises `ModelLoadError`.
        """
        if self.is_loaded(model):
            return True
        spec = self.specs.get(model)
        if spec is None:
            raise ModelLoadError(f"{model} is not in MODELS_DIR any more.")
        size = self.measure(model)
        stay = [name for name in self._loaded if self._stays(name, busy)]
        if self.bytes_used(stay) + size > self.budget.limit:
            if any(name in busy for name in stay):
                return False
            if stay or not self.budget.measured:
                raise ModelTooLarge(self._too_large(model, size, stay))
        while self._loaded and self.bytes_used() + size > self.budget.limit and self._unload_oldest(busy):
            pass

        def report(share: float) -> None:
            self.loading = (model, share)
            progress(share)

        try:
            self.add(self._load_with_room(spec, busy, report))
        except BaseException:
            return_memory()  # what was loaded of it
            raise
        finally:
            self.loading = None
        return True

    def add(self, family: LoadedFamily) -> None:
        """Keep a loaded model, whose weights share the memory of equal weights of other models."""
        name = family.spec.name
        freed = share_equal_weights(family.networks, [other.networks for other in self._loaded.values()])
        if freed:
            _log.info("weights are shared with other models", model=name, bytes=freed)
        self._storages[name] = storages_of(family.networks.values())
        self._sizes[name] = self.bytes_used([name])
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
        self._sizes = {name: size for name, size in self._sizes.items() if name in specs and name not in changed}
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
                    need = gigabytes(self.size_of(spec.name))
                    raise ModelTooLarge(f"{spec.name} needs {need} for its weights, which are not free.") from error

    def _unload_oldest(self, busy: Collection[str]) -> bool:
        """Unload the least recently used model that may be; false if there is none."""
        oldest = next((name for name in self._loaded if not self._stays(name, busy)), None)
        if oldest is not None:
            self.unload(oldest)
        return oldest is not None

    def _stays(self, model: str, busy: Collection[str]) -> bool:
        return model in busy or model in self.pinned

    def _too_large(self, model: str, size: int, stay: Collection[str]) -> str:
        limit = f"MODEL_MEMORY allows {gigabytes(self.budget.limit)}"
        kept = f", of which {gigabytes(self.bytes_used(stay))} hold pinned models ({', '.join(stay)})" if stay else ""
        return f"{model} needs {gigabytes(size)} for its weights, and {limit}{kept}."
