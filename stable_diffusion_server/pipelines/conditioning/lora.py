"""Loads the LoRAs that requests name, and says which row of a pass has which.

Weights of the model never change: see `adapters/lora_hooks.py`. So requests with different LoRAs share forward passes,
and several threads may draw with different ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import structlog
from cachetools import LRUCache
from safetensors.torch import load

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.parsing import LoraParts, read_lora_parts
from stable_diffusion_server.pipelines.adapters.lora_blocks import weights_by_block
from stable_diffusion_server.pipelines.adapters.lora_hooks import LayerHook, applied
from stable_diffusion_server.pipelines.adapters.lora_rows import Adapter, RowAdapters, RowPlan, WeightedAdapter
from stable_diffusion_server.pipelines.adapters.lora_targets import LayerTable
from stable_diffusion_server.pipelines.conditioning.lora_files import LoraFile, digest_of, read_header, read_lora
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder, find, names_in
from stable_diffusion_server.pipelines.conditioning.lora_weights import fit_lora

__all__ = [
    "ActiveLoras",
    "LoadedLora",
    "LoraManager",
    "Loras",
    "add_to_controlnet",
    "digest_of",
    "digests_and_weights",
    "find",
    "names_in",
    "read_header",
    "remarks_of",
]

Loras = Sequence[tuple[str, float]]

# LoRAs that stay loaded besides those in use; the least recently used is unloaded first.
MAX_IDLE = 8
_MAX_REFUSED, _MAX_PLANS = 1024, 8

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedLora:
    """A loaded LoRA, by its digest; it stays loaded while a reference to this exists.

    `remarks` are sentences on what of its file is not used.
    """

    digest: str
    adapter: Adapter
    remarks: tuple[str, ...] = ()


class Strength(NamedTuple):
    """The weights of a LoRA in the denoiser and in the text encoders; `blocks` multiply both (`weights_by_block`)."""

    denoiser: float
    encoders: float
    blocks: tuple[float, ...] = ()

    def plus(self, other: Strength) -> Strength:
        """Both together, with the same `blocks`."""
        return self._replace(denoiser=self.denoiser + other.denoiser, encoders=self.encoders + other.encoders)


ActiveLoras = tuple[tuple[LoadedLora, Strength], ...]


def digests_and_weights(used: ActiveLoras) -> tuple[tuple[str, Strength], ...]:
    """The digest and the weights of each LoRA."""
    return tuple((held.digest, strength) for held, strength in used)


def remarks_of(used: ActiveLoras) -> tuple[str, ...]:
    """Sentences on what of these LoRAs is not used, and on what a weight means."""
    return tuple(remark for held, _ in used for remark in held.remarks)


def add_to_controlnet(controlnet: Any, path: Path) -> None:
    """Add a LoRA to a ControlNet permanently. Raises `ModelLoadError` when it does not fit."""
    try:
        file = read_lora(path)
        first = next(iter(file.header.tensors), "").partition(".")[0]
        prefix = first if first in ("transformer", "controlnet", "unet") else None
        controlnet.load_lora_adapter(load(file.data), prefix=prefix, adapter_name="own")
    except ModelLoadError as error:
        raise ModelLoadError(f"CONTROLNET_LORA: {error.detail}") from error
    except Exception as error:  # the file is input, and the library raises many types
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} does not fit the ControlNet.") from error
    if "own" not in getattr(controlnet, "peft_config", {}):
        raise ModelLoadError(f"CONTROLNET_LORA: {path.name} holds nothing for the ControlNet.")


class LoraManager:
    """The LoRAs of one pipeline, loaded on first use and identified by content. Thread-safe.

    `always` are (file, weight) of the model's built-in LoRAs, loaded at once.
    """

    def __init__(
        self,
        pipeline: Any,
        folder: LoraFolder | Path | None = None,
        always: Sequence[tuple[Path, float]] = (),
    ) -> None:
        self._table = LayerTable(pipeline)
        self._folder = folder if isinstance(folder, LoraFolder) else LoraFolder(folder)
        self._lock = RLock()
        self._hooks: dict[tuple[str, str], LayerHook] = {}
        self._held: WeakValueDictionary[str, LoadedLora] = WeakValueDictionary()
        self._recent: OrderedDict[str, LoadedLora] = OrderedDict()
        # Reasons of refusals by digest.
        self._refused: LRUCache[str, str] = LRUCache(_MAX_REFUSED)
        self._plans: LRUCache[tuple[ActiveLoras, ...], RowPlan] = LRUCache(_MAX_PLANS)
        for file, weight in always:
            loaded = self._load(read_lora(file))
            for layer in loaded.adapter.changes:
                self._hooks[layer].always += (self._weighted(loaded, Strength(weight, weight)),)

    def use(self, loras: Loras, digests: Sequence[str] = (), parts: Sequence[tuple[str, str]] = ()) -> ActiveLoras:
        """These LoRAs by name and weight, loaded if necessary; `applied` and `applied_by_row` run passes with them.

        `digests`, one each, say which content is meant under a name; without them it is the present one. `parts` are
        weights by parts of the model, by name, as `read_lora_parts` reads them. Raises `InvalidInput` with the reason
        for an unknown name, a file that does not fit, one that was replaced, and another number of blocks.
        """
        wanted: dict[LoadedLora, Strength] = {}
        by_part = {name: read_lora_parts(text) for name, text in parts}
        for number, (name, weight) in enumerate(loras):
            digest = digests[number] if digests else self._folder.digest(name)
            own = by_part.get(name, LoraParts())
            strength = Strength(weight, weight if own.encoders is None else own.encoders, own.blocks)
            if strength.blocks:
                weights_by_block(self._table.parts[self._table.denoiser], strength.blocks)
            held = self._hold(name, digest)
            if held in wanted and wanted[held].blocks != strength.blocks:
                raise InvalidInput(f"{name} is named twice, with other weights by block.", field="lora")
            wanted[held] = wanted[held].plus(strength) if held in wanted else strength
        return tuple(wanted.items())

    @contextmanager
    def applied(self, used: ActiveLoras) -> Iterator[None]:
        """Run the passes of this thread with these LoRAs in all rows."""
        with self.applied_by_row([used]):
            yield

    @contextmanager
    def applied_by_row(self, used: Sequence[ActiveLoras], counts: Sequence[int] | None = None) -> Iterator[None]:
        """Run the passes of this thread with the LoRAs of each request: in `counts` rows one after the other."""
        rows = [own for own, count in zip(used, counts or [1] * len(used), strict=True) for _ in range(count)]
        with applied(self._plan(rows) if any(rows) else None):
            yield

    def _plan(self, rows: list[ActiveLoras]) -> RowPlan:
        sets = list(dict.fromkeys(rows))
        rows = rows if len(sets) > 1 else sets
        with self._lock:
            plan = self._plans.get(tuple(rows))
            if plan is None:
                weighted: list[RowAdapters] = [tuple(self._weighted(*one) for one in own) for own in sets]
                plan = self._plans[tuple(rows)] = RowPlan(weighted, [sets.index(row) for row in rows])
            return plan

    def _weighted(self, loaded: LoadedLora, strength: Strength) -> WeightedAdapter:
        weights = dict.fromkeys(self._table.parts, strength.encoders) | {self._table.denoiser: strength.denoiser}
        if not strength.blocks:
            return WeightedAdapter(loaded.adapter, weights)
        encoders, layers = weights_by_block(self._table.parts[self._table.denoiser], strength.blocks)
        weights = {name: weight * encoders.get(name, 1.0) for name, weight in weights.items()}
        return WeightedAdapter(loaded.adapter, weights, layers)

    def _hold(self, name: str, digest: str) -> LoadedLora:
        """The loaded LoRA of that digest."""
        with self._lock:
            held = self._held.get(digest)
            if held is None:
                if digest in self._refused:
                    raise InvalidInput(f"{name}{self._refused[digest]}", field="lora")
                file = self._folder.read(name)
                if file.digest != digest:
                    raise InvalidInput(f"{file.name} was replaced while the order waited; ask again.", field="lora")
                held = self._held[digest] = self._load(file)
            self._recent[digest] = held
            self._recent.move_to_end(digest)
            if len(self._recent) > MAX_IDLE:
                self._recent.popitem(last=False)
                self._plans.clear()  # they hold LoRAs too
            return held

    def _load(self, file: LoraFile) -> LoadedLora:
        try:
            fitted = fit_lora(file, self._table)
        except InvalidInput as error:
            self._refuse(file, error.detail)
            raise
        for layer in fitted.changes:
            if layer not in self._hooks:
                hook = self._hooks[layer] = LayerHook(layer)
                component, path = layer
                self._table.parts[component].get_submodule(path).register_forward_hook(hook)
        return LoadedLora(file.digest, Adapter(fitted.changes), fitted.remarks)

    def _refuse(self, file: LoraFile, why: str) -> None:
        """Remember why this content does not fit, so that it is not loaded again."""
        # The same content may have another file name.
        self._refused[file.digest] = why.removeprefix(Path(file.name).stem)
        _log.warning("an adapter is refused", file=file.name, why=why)
        self._folder.refuse(file, self._table.denoiser, why)
