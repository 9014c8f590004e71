"""Tunes garbage collection and malloc for a process that runs for months."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time

from stable_diffusion_server.app.lifecycle import ProcessHooks

# Constants of glibc's malloc.h. By default each thread has an arena, up to eight per core. Memory freed in one arena
# is not reused in another, so memory grew to the largest tensors of every thread.
_M_ARENA_MAX, _ARENAS = -8, 2
# Keep freed memory for the tensors of the next step instead of returning it to the system.
_M_MMAP_THRESHOLD, _MAPPED_FROM = -3, 32 << 20  # glibc's maximum
_M_TRIM_THRESHOLD, _KEPT_FREE = -1, 1 << 30
# Only malloc_trim, which takes a millisecond, returns free memory between used blocks to the system.
_TRIM_SECONDS = 30


def freeze_gc() -> None:
    """Collect garbage, then exclude all live objects from later collections.

    The models' libraries are about a million objects. Full collections scanned them every few seconds under
    load and paused all requests for 0.3 s. Use only in a process that serves one app until it ends: a live object that
    later becomes part of a garbage cycle is never freed.
    """
    gc.collect()
    gc.freeze()


def tune_malloc() -> None:
    """Limit glibc to two arenas and trim them every 30 s; does nothing with another C library.

    Call it once, before other threads start.
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


class ServingHooks(ProcessHooks):
    """Hooks of a process that serves one application until it ends."""

    def libraries_loaded(self) -> None:
        """Exclude the loaded objects from garbage collection."""
        freeze_gc()
