"""Makes changes of the factors of LoHa and LoKr, if their shapes fit the layer."""

from __future__ import annotations

import math

import torch

from stable_diffusion_server.pipelines.adapters.lora_deltas import LayerChange
from stable_diffusion_server.pipelines.adapters.lora_layer_tensors import LayerTensors, Rows, with_scalar


def loha_change(checked: LayerTensors, own: tuple[int, ...], rows: Rows) -> LayerChange:
    """The change of a LoHa's factors."""
    out, rest = checked.shape[0], math.prod(checked.shape[1:])
    ranks = [checked.rank(f"hada_w{number}_b", 0) for number in (1, 2)]
    factors: dict[str, torch.Tensor] = {}
    for number, rank in enumerate(ranks, 1):
        if f"hada_t{number}" in checked:  # Tucker: the factors are for the sides, the core for the kernel
            factors[f"hada_t{number}"] = checked.take(f"hada_t{number}", (rank, rank, *checked.shape[2:]))
            factors[f"hada_w{number}_a"] = checked.take(f"hada_w{number}_a", (rank, out))
            factors[f"hada_w{number}_b"] = checked.take(f"hada_w{number}_b", (rank, checked.shape[1]))
        else:
            factors[f"hada_w{number}_a"] = checked.take(f"hada_w{number}_a", (out, rank))
            factors[f"hada_w{number}_b"] = checked.take(f"hada_w{number}_b", (rank, rest))
    return LayerChange(
        own, checked.alpha(ranks[0]), factors=with_scalar(checked, **factors), whole=checked.shape, rows=rows
    )


def lokr_change(checked: LayerTensors, own: tuple[int, ...], rows: Rows) -> LayerChange:
    """The change of a LoKr's factors."""
    factors: dict[str, torch.Tensor] = {}
    sides, rank = [], 0
    for number in (1, 2):
        made, side, own_rank = _kronecker_part(checked, number)
        factors |= made
        sides.append(side)
        rank = own_rank or rank
    for place in (0, 1):
        if sides[0][place] * sides[1][place] != checked.shape[place]:
            raise checked.mismatch(next(kind for kind in checked.tensors if kind.startswith("lokr_w2")))
    # With both parts whole, alpha does not act (as LyCORIS reads such files).
    scale = checked.alpha(rank) if rank else 1.0
    return LayerChange(own, scale, factors=with_scalar(checked, **factors), whole=checked.shape, rows=rows)


def _kronecker_part(checked: LayerTensors, number: int) -> tuple[dict[str, torch.Tensor], tuple[int, int], int]:
    """The tensors of one half, the sides of its matrix, and its rank; 0 if it is whole."""
    name, kernel = f"lokr_w{number}", checked.shape[2:] if number == 2 else ()
    if name in checked:
        whole = checked.tensors[name]
        if whole.ndim < 2:
            raise checked.mismatch(name)
        sides = (int(whole.shape[0]), int(whole.shape[1]))
        return {name: checked.take(name, (*sides, *kernel))}, sides, 0
    rank = checked.rank(f"{name}_b", 0)
    first, second = (checked.tensors.get(f"{name}_{half}") for half in "ab")
    if first is None or second is None or first.ndim < 2:
        checked.take(f"{name}_a")
        raise checked.mismatch(f"{name}_a")
    if number == 2 and "lokr_t2" in checked:
        core = checked.take("lokr_t2", (rank, rank, *kernel))
        sides = (int(first.shape[1]), int(second.shape[1]))
        made = {"lokr_t2": core, f"{name}_a": checked.take(f"{name}_a", (rank, sides[0]))}
        return {**made, f"{name}_b": checked.take(f"{name}_b", (rank, sides[1]))}, sides, rank
    columns = second.numel() // (rank * math.prod(kernel)) if rank else 0
    sides = (int(first.shape[0]), columns)
    made = {f"{name}_a": checked.take(f"{name}_a", (sides[0], rank))}
    made[f"{name}_b"] = checked.take(f"{name}_b", (rank, columns, *kernel), (rank, columns * math.prod(kernel)))
    if made[f"{name}_b"].ndim == 2 and kernel:
        made[f"{name}_b"] = made[f"{name}_b"].reshape(rank, columns, *kernel)
    return made, sides, rank
