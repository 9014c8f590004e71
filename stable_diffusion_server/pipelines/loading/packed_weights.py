"""Weights that stay in fewer bits in memory, and the linear layer that unpacks them for each product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from stable_diffusion_server.pipelines.library.gguf_header import GGUF_BLOCKS
from stable_diffusion_server.pipelines.loading.gguf_blocks import unpack_blocks

# Formats of one byte per weight, by their name in a safetensors header.
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix in a packed format: `raw` is uint8, rows × bytes; `scale` fp32, 1 × 1 or rows × 1, multiplies float8.

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
    """The matrix of packed bytes, in `dtype`; scaled float8 is multiplied in fp32."""
    if kind not in FLOAT8:
        return unpack_blocks(raw, kind).to(dtype)
    weight = raw.view(FLOAT8[kind])
    return weight.to(dtype) if scale is None else (weight.float() * scale).to(dtype)


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]  # torch is read without its types
    """A linear layer whose weight stays packed.

    The parameter `weight` is uint8: moving the module to a device moves it, casts of the module leave it alone, and
    LoRAs beside it take no dtype from it.
    """

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.format = weight.format
        self.weight = torch.nn.Parameter(weight.raw, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", weight.scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """… × in features → … × out features, computed in the dtype of `input`."""
        weight = unpack(self.weight, self.format, self.scale, input.dtype)
        return torch.nn.functional.linear(input, weight, self.bias)


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a component has packed layers."""
    return any(isinstance(layer, PackedLinear) for layer in module.modules())
