"""Tells whether work is in hand of which nothing has ended for longer than it may take. Knows no work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class ProgressMonitor:
    """Watches work of which each piece ends within `bound` seconds. Any thread may ask."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._in_hand = 0
        self._moved = 0.0

    @property
    def pending(self) -> int:
        """Pieces of work that were begun and have not ended."""
        return self._in_hand

    @contextmanager
    def track(self) -> Iterator[None]:
        """A piece of work lasts as long as the block."""
        if not self._in_hand:
            self._moved = time.monotonic()
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1
            self._moved = time.monotonic()

    def stalled_seconds(self) -> float:
        """Seconds for which nothing has ended, once they are more than the bound; 0 before, and without work."""
        silent = time.monotonic() - self._moved
        return silent if self._in_hand and silent > self._bound else 0.0
