"""Caches prompt embeddings, up to a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar, cast

import torch
from cachetools import LRUCache

T = TypeVar("T", bound="tuple[torch.Tensor | None, ...]")

LIMIT_BYTES = 64 * 2**20


class PromptCache:
    """Embeddings by everything they were computed from, the least recently used evicted first. Thread-safe.

    The cached tensors themselves are returned, so callers must not modify them.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._entries: LRUCache[Hashable, tuple[torch.Tensor | None, ...]] = LRUCache(limit_bytes, getsizeof=size_of)
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of the cached tensors."""
        return int(self._entries.currsize)

    def get_or_create(self, key: Hashable, make: Callable[[], T]) -> T:
        """The cached value of `key`, or what `make` returns. The key must hold everything the value depends on."""
        with self._lock:
            if (cached := self._entries.get(key)) is not None:
                return cast(T, cached)
        value = make()
        if size_of(value) <= self.limit_bytes:  # cachetools refuses an item that is larger than the cache
            with self._lock:
                self._entries[key] = value
        return value


def size_of(tensors: tuple[torch.Tensor | None, ...]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
