"""Which row of a pass has which LoRAs, and what they add to the output of a layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import LayerChange, magnitude_ratio, output_of
from stable_diffusion_server.pipelines.adapters.lora_stacks import FactorStack

Layer = tuple[str, str]


class Adapter:
    """The changes of one LoRA by layer (component, path), moved to where they are needed at first use. Thread-safe."""

    def __init__(self, changes: Mapping[Layer, LayerChange]) -> None:
        self.changes = changes
        self._placed: dict[Hashable, tuple[LayerChange, torch.Tensor | None]] = {}

    def of(self, layer: Layer, module: torch.nn.Module, like: torch.Tensor) -> tuple[LayerChange, torch.Tensor | None]:
        """The change of a layer in dtype and device of `like`, and the ratio of its magnitudes if it has some."""
        key = (layer, like.device, like.dtype)
        placed = self._placed.get(key)
        if placed is None:
            change = self.changes[layer]
            ratio = None if change.magnitude is None else magnitude_ratio(change, module).to(like.device, like.dtype)
            placed = self._placed[key] = (_moved(change, like), ratio)
        return placed


def _moved(change: LayerChange, like: torch.Tensor) -> LayerChange:
    named = {name: getattr(change, name) for name in ("down", "up", "bias", "magnitude")}
    moved: dict[str, Any] = {
        name: None if tensor is None else tensor.to(like.device, like.dtype) for name, tensor in named.items()
    }
    factors = change.factors and {name: value.to(like.device, like.dtype) for name, value in change.factors.items()}
    return replace(change, factors=factors, **moved)


@dataclass(frozen=True, slots=True, eq=False)
class WeightedAdapter:
    """An adapter and its weight in each layer: `weights` by component, `blocks` by the path of a layer."""

    adapter: Adapter
    weights: Mapping[str, float]
    blocks: Mapping[str, float] = field(default_factory=dict)

    def weight(self, layer: Layer) -> float:
        """The weight in a layer, 0 in one that it does not change."""
        return self.weights[layer[0]] * self.blocks.get(layer[1], 1.0) if layer in self.adapter.changes else 0.0


RowAdapters = tuple[WeightedAdapter, ...]


class RowPlan:
    """What each row of a pass has: `sets` of adapters, and for each row its place in them; all rows alike if one."""

    def __init__(self, sets: Sequence[RowAdapters], rows: Sequence[int]) -> None:
        self.sets = sets
        self.rows = rows
        self._stacks: dict[Layer, FactorStack] = {}

    def __call__(self, layer: Layer, module: Any, given: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's output with what the rows' adapters add."""
        if len(self.sets) == 1:
            return with_adapters(self.sets[0], layer, module, given, output)
        if len(given) != len(self.rows):
            raise ValueError(f"{len(self.rows)} rows of LoRAs, and {len(given)} rows in {layer}")
        stack = self._stacks.get(layer)
        if stack is None:
            stack = self._stacks[layer] = self._stack(layer, module, given)
        made = stack.added_to(output, given, module)
        for place, rows in stack.others:
            more = with_adapters(self.sets[place], layer, module, given[rows], output[rows])
            made = made.index_copy(0, rows, more)
        return made

    def _stack(self, layer: Layer, module: Any, given: torch.Tensor) -> FactorStack:
        """The factors of all rows whose changes of this layer are of low rank, and the other rows by their sets."""
        factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        others = []
        for place, row in enumerate(self.sets):
            used = [(one.adapter.of(layer, module, given)[0], one.weight(layer)) for one in row if one.weight(layer)]
            if used and all(change.is_low_rank for change, _ in used):
                downs, ups = zip(*(change.scaled(weight) for change, weight in used), strict=True)
                factors[place] = (torch.cat(downs), torch.cat(ups, dim=1))
            elif used:
                rows = [number for number, own in enumerate(self.rows) if own == place]
                others.append((place, torch.tensor(rows, device=given.device)))
        return FactorStack.of(factors, self.rows, others)


def with_adapters(
    row: RowAdapters, layer: Layer, module: Any, given: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """A layer's output with what the adapters of all its rows add."""
    made = output
    for one in row:
        if weight := one.weight(layer):
            change, ratio = one.adapter.of(layer, module, given)
            made = made + output_of(change, module, given, output, ratio, weight)
    return made
