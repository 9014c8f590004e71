"""Computes the bytes of a model's components, from shapes before loading and from storage afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from stable_diffusion_server.pipelines.loading.placement import Footprint
from stable_diffusion_server.pipelines.model_spec import ModelSpec

# Bytes per pixel that a request needs besides the weights: roughly the widest layers of a VAE decoder.
_WORKING_BYTES = 2048


def footprint_of(spec: ModelSpec, parts: Mapping[str, torch.nn.Module], dtype: torch.dtype) -> Footprint:
    """The bytes these components need in `dtype`; a ControlNet may be one of them."""
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
    """Bytes of the modules in memory; shared storage counts once."""
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
