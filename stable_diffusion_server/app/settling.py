"""Makes a process fit to serve for months: the collector spares what stays, and the heap stays one heap."""

from __future__ import annotations

import ctypes
import gc

# Of glibc's malloc.h. Its arenas are one a thread, up to eight a core, and give nothing to one another: tensors that
# were freed in one of them were asked of the system again in the next, until all had had their largest.
_M_ARENA_MAX, _ARENAS = -8, 2


def settle() -> None:
    """Drop what is garbage now and have the collector never look at the rest again.

    The models' libraries are some million objects. Python's full collections went through all of them every few
    seconds under load, and for 0.3 s nobody was answered. For a process that serves one app until it ends: what is
    alive now and becomes garbage in a cycle later stays.
    """
    gc.collect()
    gc.freeze()


def share_heap() -> None:
    """Have all threads take memory from the same few heaps, where the C library is one that does otherwise.

    Call it before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)
