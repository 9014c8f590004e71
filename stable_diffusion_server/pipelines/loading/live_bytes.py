"""Counts the bytes that a computation holds at its worst moment, exactly and without a device or weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most bytes that tensors made by `compute` hold together; what exists before is not counted.

    On modules and tensors of the meta device nothing is computed. Attention counts as one fused kernel, as PyTorch has
    for CUDA and the CPU: its scores are never held as a whole. Workspaces of kernels are not counted; cuDNN takes more
    where memory is free, and does with less where it is not.
    """
    with torch.inference_mode(), _FusedAttention(), _LiveBytes() as counted:
        result = compute()
    del result
    peak: int = counted.peak
    return peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[misc]  # torch is read without its types
    """Sums the bytes of all storages that operators returned and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.peak: int = 0
        self._live: dict[int, int] = {}
        self._total = 0

    def __torch_dispatch__(
        self, operator: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._live and storage._cdata not in given:  # a view of older memory is free
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        place = storage._cdata
        self._live[place] = storage.nbytes()
        self._total += self._live[place]
        self.peak = max(self.peak, self._total)
        weakref.finalize(storage, self._drop, place)

    def _drop(self, place: int) -> None:
        self._total -= self._live.pop(place)


class _FusedAttention(TorchFunctionMode):  # type: ignore[misc]  # as above
    """Gives attention its result alone; PyTorch's own path for the meta device would hold the scores."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        query, value = given["query"], given["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])
