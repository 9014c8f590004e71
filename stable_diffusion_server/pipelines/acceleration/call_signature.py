"""Separates arguments and outputs into tensors and their structure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch


def _layout(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _anything(_tensor: torch.Tensor) -> Hashable:
    return "tensor"


def signature(value: Any) -> Hashable:
    """A hashable key of a value, with shapes, dtypes, devices and strides in place of its tensors."""
    return _key(value, _layout)


def structure(value: Any) -> Hashable:
    """A hashable key of a value, the same for any tensors."""
    return _key(value, _anything)


def _key(value: Any, of_tensor: Callable[[torch.Tensor], Hashable]) -> Hashable:
    match value:
        case torch.Tensor():
            return of_tensor(value)
        case Mapping():
            return tuple((name, _key(part, of_tensor)) for name, part in value.items())
        case list() | tuple():
            return tuple(_key(part, of_tensor) for part in value)
        case _:
            return type(value), value


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The value with its tensors replaced."""
    match value:
        case torch.Tensor():
            return next(tensors)
        case Mapping():
            # Includes the outputs of transformers, mappings that are created by keywords.
            return type(value)(**{name: rebuild(part, tensors) for name, part in value.items()})
        case list() | tuple():
            return type(value)(rebuild(part, tensors) for part in value)
        case _:
            return value
