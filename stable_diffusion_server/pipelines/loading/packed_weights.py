"""Weights that stay in fewer bits in memory, and the layers that unpack them for each product."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from stable_diffusion_server.pipelines.library.gguf_header import GGUF_BLOCKS
from stable_diffusion_server.pipelines.loading.gguf_blocks import unpack_blocks

# Formats of one byte per weight, by their name in a safetensors header.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Formats of two bytes per weight, by their name in a header; and integers times a scale for each row.
HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
INT8 = "I8"
_INT8_LARGEST = 127


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix in a packed format: `raw` is bytes, rows × …; `scale` fp32, 1 × 1 or rows × 1, multiplies bytes.

    `format` is a name of `FLOAT8` or of a GGUF type.
    """

    raw: torch.Tensor
    format: str
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the unpacked matrix."""
        rows, size = self.raw.shape
        if self.format in FLOAT8:
            return rows, size
        weights, stored = GGUF_BLOCKS[self.format]
        return rows, size // stored * weights

    def rows(self, first: int, last: int) -> PackedWeight:
        """The rows from `first` up to `last`, copied out of the file's memory."""
        scale = self.scale if self.scale is None or len(self.scale) == 1 else self.scale[first:last].clone()
        return replace(self, raw=self.raw[first:last].clone(), scale=scale)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in `dtype`."""
        return unpack(self.raw, self.format, self.scale, dtype)


def unpack(raw: torch.Tensor, kind: str, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of packed bytes, in `dtype`; what has a scale is multiplied in fp32."""
    plain = {**FLOAT8, **HALF, INT8: torch.int8}
    if kind not in plain:
        return unpack_blocks(raw, kind).to(dtype)
    weight = raw.view(plain[kind])
    return weight.to(dtype) if scale is None else weight.float().mul_(scale).to(dtype)


@dataclass(frozen=True, slots=True)
class WeightStorage:
    """What is packed while a file is loaded.

    With `half`, 16-bit weights stay as they are in the file although fp32 is computed, which takes less memory and more
    time. The components `int8` are quantized.
    """

    half: bool = False
    int8: Collection[str] = ()

    def packing(self, component: str, dtype: torch.dtype) -> Callable[[torch.Tensor], PackedWeight | None] | None:
        """What packs the weights of a component that computes in `dtype`; `None` if nothing does."""
        if component in self.int8:
            return to_int8
        return keep_half if self.half and dtype == torch.float32 else None


UNPACKED = WeightStorage()


def keep_half(weight: torch.Tensor) -> PackedWeight | None:
    """The weight, rows × …, as it is in 16 bits, without a copy; `None` if it has another dtype."""
    kind = next((name for name, dtype in HALF.items() if dtype == weight.dtype), None)
    return None if kind is None else PackedWeight(weight.flatten(1).contiguous().view(torch.uint8), kind)


def to_int8(weight: torch.Tensor) -> PackedWeight:
    """The weight, rows × …, as integers from -127 to 127 times a scale for each row, which its largest number sets."""
    rows = weight.flatten(1).float()
    scale = (rows.abs().amax(1, keepdim=True) / _INT8_LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
    # Not uint8: T5 casts its input to the dtype of a weight unless that is int8.
    return PackedWeight((rows / scale).round_().to(torch.int8), INT8, scale)


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is read without its types
    """A linear layer whose weight stays packed.

    The parameter `weight` is uint8: moving the module to a device moves it, casts of the module leave it alone, and
    LoRAs beside it take no dtype from it. `multiply` is what computes, given input, weight and bias.
    """

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.format = weight.format
        self.weight = torch.nn.Parameter(weight.raw, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", weight.scale)
        self.multiply: Callable[..., torch.Tensor] = functional.linear

    def unpacked(self) -> torch.Tensor:
        """The weight in fp32: out × in features."""
        return unpack(self.weight, self.format, self.scale, torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """… × in features → … × out features, computed in the dtype of `input`."""
        return self.multiply(input, unpack(self.weight, self.format, self.scale, input.dtype), self.bias)


class PackedConv2d(torch.nn.Conv2d):  # type: ignore[misc]  # as above
    """A convolution whose weight stays packed as a matrix, out channels × bytes; otherwise as `layer`."""

    def __init__(self, weight: PackedWeight, layer: torch.nn.Conv2d) -> None:
        torch.nn.Module.__init__(self)
        for name in (*layer.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(layer, name))
        self.format = weight.format
        self.weight = torch.nn.Parameter(weight.raw, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", weight.scale)

    def unpacked(self) -> torch.Tensor:
        """The weight in fp32, as a matrix: out channels × the rest."""
        return unpack(self.weight, self.format, self.scale, torch.float32)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows × in channels × height × width → rows × out channels × height × width."""
        weight = unpack(self.weight, self.format, self.scale, input.dtype)
        kernel = weight.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return self._conv_forward(input, kernel, self.bias)


def can_be_packed(layer: torch.nn.Module) -> bool:
    """Whether a layer computes the same with a packed weight; subclasses compute differently."""
    return type(layer) in (torch.nn.Linear, torch.nn.Conv2d)


def packed_layer(layer: torch.nn.Module, weight: PackedWeight) -> torch.nn.Module:
    """The layer with a packed weight in place of its own, and with its bias."""
    if isinstance(layer, torch.nn.Conv2d):
        return PackedConv2d(weight, layer)
    bias = layer.bias
    return PackedLinear(weight, None if bias is None else bias.data)


def pack_layers(network: torch.nn.Module, pack: Callable[[torch.Tensor], PackedWeight]) -> None:
    """Pack the weights of a network's layers in place, except those of LoRAs."""
    for path, layer in [*network.named_modules()]:
        if can_be_packed(layer) and "lora_" not in path:
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, packed_layer(layer, pack(layer.weight.detach())))


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a component has packed layers."""
    return any(isinstance(layer, PackedLinear) for layer in module.modules())
