"""How many bytes a model's parts take: by their shapes before they are loaded, by their storage afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from stable_diffusion_server.pipelines.loading.placement import Footprint
from stable_diffusion_server.pipelines.model_spec import ModelSpec

# What one drawing needs beside the weights, for each pixel: the widest layers of a VAE decoder, roughly.
_WORKING_BYTES = 2048


def footprint_of(spec: ModelSpec, parts: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Footprint:
    """What these parts need in `dtype`, by their shapes; a ControlNet may be among them."""
    layers = [
        sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for part in parts.values()
        for module in part.modules()
    ]
    size = dtype.itemsize
    return Footprint(
        parts={name: parameters_of(part) * size for name, part in parts.items()},
        quantized=tuple(name for name in spec.quantizable_parts if name in parts),
        layer=max(layers, default=0) * size,
        weight_bytes=size,
        working=_WORKING_BYTES * spec.native_pixels,
    )


def parameters_of(module: torch.nn.Module) -> int:
    """Number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def bytes_of(*modules: torch.nn.Module) -> int:
    """Bytes the modules hold in memory; storage they share, among themselves too, counts once."""
    storages: dict[tuple[str, int], int] = {}

    def visit(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor is made of others
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()

    for module in modules:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            visit(tensor)
    return sum(storages.values())
