"""Turns pixels into files on threads of their own, so that large pictures never hold up small ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_THREADS = 2
# Above this many bytes of pixels a picture is large, four times sooner where nothing may be lost: about half a second.
_LARGE_BYTES = 12_582_912
_LOSSLESS_TIMES = 4


class EncoderPool:
    """Two threads, of which only one ever works at a large picture. Lives on one event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="encode")
        self._large = asyncio.Semaphore(_THREADS - 1)

    async def encode(self, size: int, encode: Callable[[], bytes], *, lossless: bool = False) -> bytes:
        """What `encode` gives for a picture of `size` bytes of pixels."""
        loop = asyncio.get_running_loop()
        if size * (_LOSSLESS_TIMES if lossless else 1) <= _LARGE_BYTES:
            return await loop.run_in_executor(self._threads, encode)
        async with self._large:
            # A thread goes on when its caller has left; the place is free again only when it has ended.
            work = asyncio.ensure_future(loop.run_in_executor(self._threads, encode))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
