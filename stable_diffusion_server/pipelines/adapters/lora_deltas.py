"""What an adapter changes in one layer: LoRA, LoCon, LoHa, LoKr, full differences and DoRA, exact to their formulas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

Factors = Mapping[str, torch.Tensor]


class LoraMismatch(ValueError):
    """Why a LoRA cannot be used, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The change of one linear layer or convolution, in the dtype and on the device of its tensors.

    `down` (rank × in, or rank × in × k × k) and `up` (out × rank) are those of a LoRA. Other methods have `factors`
    instead, of which the difference of the weight is computed for each pass: held whole, those of all layers are as
    large as the model. `whole` is the shape of the weight that the factors are for, and `rows` are those of it (from,
    to) that this layer has, in order, where the trainer's model has one layer for several of ours. The difference is
    multiplied by `scale`. `bias` (out) is added to the layer's bias. With `magnitude` (numbers of rows, or of columns
    if `by_column`) the layer's weight gets these norms (DoRA).
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    factors: Factors | None = None
    whole: tuple[int, ...] = ()
    rows: tuple[tuple[int, int], ...] = ()
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    by_column: bool = False

    @property
    def is_low_rank(self) -> bool:
        """Whether it is nothing but a product of two matrices, which rows of one pass may have each their own of."""
        return self.down is not None and self.bias is None and self.magnitude is None

    def scaled(self, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """`down`, and `up` times the scale and a weight. Raises `ValueError` unless it is of low rank."""
        if self.down is None or self.up is None:
            raise ValueError("this change is not of low rank")
        return self.down, self.up * (self.scale * weight)

    def weight(self) -> torch.Tensor | None:
        """The difference of the weight, without `magnitude`: the layer's shape; `None` if there is none."""
        if self.up is not None and self.down is not None:
            return (self.up @ self.down.flatten(1)).reshape(self.shape) * self.scale
        if self.factors is None:
            return None
        return take_rows(product_of(self.factors, self.whole), self.rows) * self.scale


def take_rows(tensor: torch.Tensor, rows: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Those rows of a tensor, in order; all of them if none is named."""
    if not rows:
        return tensor
    parts = [tensor[first:last] for first, last in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def product_of(factors: Factors, shape: tuple[int, ...]) -> torch.Tensor:
    """The unscaled difference of a weight of this shape, of a method's factors by their names in files.

    LoHa: Hyeon-Woo et al. 2022, arXiv 2108.06098; LoKr and the Tucker forms: Yeh et al. 2024, arXiv 2309.14859.
    """
    if "diff" in factors:
        made = factors["diff"]
    elif "hada_w1_a" in factors:
        made = _hadamard(factors, 1) * _hadamard(factors, 2)
    elif "mid" in factors:
        up, down = factors["up"].flatten(1), factors["down"].flatten(1)
        made = torch.einsum("ij...,pi,jr->pr...", factors["mid"], up, down)
    else:
        first, second = _kronecker(factors, 1), _kronecker(factors, 2)
        if second.ndim == 4:
            first = first[:, :, None, None]
        made = torch.kron(first, second.contiguous())
    made = made.reshape(shape)
    return made * factors["scalar"] if "scalar" in factors else made


def _hadamard(factors: Factors, number: int) -> torch.Tensor:
    first, second = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
    if f"hada_t{number}" in factors:
        return torch.einsum("ij...,ip,jr->pr...", factors[f"hada_t{number}"], first, second)
    return first @ second.flatten(1)


def _kronecker(factors: Factors, number: int) -> torch.Tensor:
    name = f"lokr_w{number}"
    if name in factors:
        return factors[name]
    first, second = factors[f"{name}_a"], factors[f"{name}_b"]
    if number == 2 and "lokr_t2" in factors:
        return torch.einsum("ij...,ip,jr->pr...", factors["lokr_t2"], first, second)
    made: torch.Tensor = (first @ second.flatten(1)).reshape(first.shape[0], *second.shape[1:])
    return made


def magnitude_ratio(change: LayerChange, layer: torch.nn.Module) -> torch.Tensor:
    """What DoRA multiplies each row (out) or column (in) of the changed weight by (Liu et al. 2024, arXiv 2402.09353).

    In fp32. Raises `LoraMismatch` where the weights are not in memory.
    """
    base = base_weight(layer)
    difference = change.weight()
    changed = base if difference is None else base + difference.to(base.device, torch.float32)
    rows = changed.transpose(0, 1) if change.by_column else changed
    norm = rows.flatten(1).norm(dim=1)
    magnitude = change.magnitude
    if magnitude is None:
        raise ValueError("a change without magnitudes has no ratio")
    return magnitude.to(base.device, torch.float32).flatten() / norm.clamp(min=torch.finfo(torch.float32).tiny)


def base_weight(layer: Any) -> torch.Tensor:
    """A layer's weight in fp32, unpacked. Raises `LoraMismatch` where it is not in memory."""
    weight = layer.unpacked() if hasattr(layer, "unpacked") else layer.weight
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):  # the quantizing libraries' own tensors
        weight = weight.dequantize()
    if weight.is_meta or weight.numel() != torch.Size(weight_shape(layer)).numel():
        raise LoraMismatch("is a DoRA, which needs weights that stay in memory and can be read; see OFFLOAD")
    return weight.detach().float().reshape(weight_shape(layer))


def weight_shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's weight, also where it is packed: out × in, or out × in × k × k."""
    if isinstance(layer, torch.nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def multiply(layer: Any, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer's product with another weight of its input side, without a bias."""
    made: torch.Tensor
    if isinstance(layer, torch.nn.Linear):
        made = functional.linear(given, weight)
    else:
        made = layer._conv_forward(given, weight, None)  # with its stride and its padding
    return made


def low_rank(layer: Any, given: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product with `down`, then with `up`: no matrix of the weight's size."""
    inner = multiply(layer, given, down)
    if inner.ndim == 4 and not isinstance(layer, torch.nn.Linear):
        return functional.conv2d(inner, up[:, :, None, None])
    return functional.linear(inner, up)


def output_of(
    change: LayerChange,
    layer: Any,
    given: torch.Tensor,
    output: torch.Tensor,
    ratio: torch.Tensor | None,
    weight: float,
) -> torch.Tensor:
    """What a change at a weight adds to a layer's `output` for the input `given`; `ratio` is that of its magnitudes.

    With DoRA, a weight is the share of the way from the layer's weight to the changed one; 0 changes nothing.
    """
    if ratio is None:
        return _difference(change, layer, given, weight)
    if change.by_column:
        ratio = ratio if isinstance(layer, torch.nn.Linear) else ratio.reshape(-1, 1, 1)
        moved = layer.forward(given * (ratio - 1)) - _shaped(layer, layer.bias)
        return (moved + _difference(change, layer, given * ratio)) * weight
    ratio, product = _shaped(layer, ratio), output - _shaped(layer, layer.bias)
    return ((ratio - 1) * product + ratio * _difference(change, layer, given)) * weight


def _difference(change: LayerChange, layer: Any, given: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    made: Any = 0.0
    if change.down is not None and change.up is not None:
        made = low_rank(layer, given, change.down, change.up) * (change.scale * weight)
    elif change.factors is not None:
        product = take_rows(product_of(change.factors, change.whole), change.rows)
        made = multiply(layer, given, product) * (change.scale * weight)
    return made if change.bias is None else made + _shaped(layer, change.bias) * weight


def _shaped(layer: Any, numbers: torch.Tensor | None) -> Any:
    """Numbers of a layer's outputs, so that they can be added to its output."""
    if numbers is None:
        return 0.0
    return numbers if isinstance(layer, torch.nn.Linear) else numbers.reshape(-1, 1, 1)
