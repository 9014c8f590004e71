"""What prompts were encoded to before, within a number of bytes. Knows tensors, and neither encoders nor jobs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

T = TypeVar("T", bound="tuple[torch.Tensor | None, ...]")

LIMIT_BYTES = 64 * 2**20


class PromptCache:
    """The tensors last used, by what they were made from. For one thread at a time.

    They are handed out as they are, so nobody may write on them.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[torch.Tensor | None, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave for this key, or gives now. The key has to hold all that the result depends on."""
        if key in self._kept:
            self._kept.move_to_end(key)
            kept: T = self._kept[key]  # type: ignore[assignment]  # a key is always asked for in one way
            return kept
        made = make()
        self._kept[key] = made
        self.bytes += size_of(made)
        while self.bytes > self.limit_bytes:
            _, dropped = self._kept.popitem(last=False)
            self.bytes -= size_of(dropped)
        return made


def size_of(tensors: tuple[torch.Tensor | None, ...]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
