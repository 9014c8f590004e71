"""Makes a process fit to serve for months: the collector spares what stays, and heaps keep little that is free."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time

# Of glibc's malloc.h. It gives each thread an arena, up to eight a core, none of which has what another one gave back:
# tensors that were freed in one were asked of the system again in the next, until all had had their largest.
_M_ARENA_MAX, _ARENAS = -8, 2
# What was freed is used again for the next tensors of a picture, which had to be asked of the system at every step.
_M_MMAP_THRESHOLD, _MAPPED_FROM = -3, 32 << 20  # the most glibc takes
_M_TRIM_THRESHOLD, _KEPT_FREE = -1, 1 << 30
# What is free amid what is held only goes back when it is asked for, which takes a millisecond.
_TRIM_SECONDS = 30


def freeze_gc() -> None:
    """Drop what is garbage now and have the collector never look at the rest again.

    The models' libraries are some million objects. Python's full collections went through all of them every few
    seconds under load, and for 0.3 s nobody was answered. For a process that serves one app until it ends: what is
    alive now and becomes garbage in a cycle later stays.
    """
    gc.collect()
    gc.freeze()


def tune_malloc() -> None:
    """Have all threads take memory from the same two heaps, and give back what is free in them every half minute.

    Nothing where the C library is not glibc. Call it once, before there are threads.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        return
    for option, value in (
        (_M_ARENA_MAX, _ARENAS),
        (_M_MMAP_THRESHOLD, _MAPPED_FROM),
        (_M_TRIM_THRESHOLD, _KEPT_FREE),
    ):
        libc.mallopt(option, value)

    def trim() -> None:
        while True:
            time.sleep(_TRIM_SECONDS)
            libc.malloc_trim(0)

    threading.Thread(target=trim, name="heap", daemon=True).start()
