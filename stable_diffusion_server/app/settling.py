"""Spares the garbage collector what a serving process keeps for its whole life. Knows nothing of what that is."""

from __future__ import annotations

import gc


def settle() -> None:
    """Drop what is garbage now and have the collector never look at the rest again.

    The models' libraries are some million objects. Python's full collections went through all of them every few
    seconds under load, and for 0.3 s nobody was answered. For a process that serves one app until it ends: what is
    alive now and becomes garbage in a cycle later stays.
    """
    gc.collect()
    gc.freeze()
