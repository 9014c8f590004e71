"""Pictures from visitors of the UI: decoded in the sandboxed processes, encoded anew, kept by token. Knows no pages."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stable_diffusion_server.errors import RateLimited
from stable_diffusion_server.ui.upload_store import UploadStore
from stable_diffusion_server.ui.work_queue import visitor_queue

T = TypeVar("T")
Pixels = NDArray[np.uint8]


class DecodeUpload(Protocol):
    """The sandboxed decoder."""

    async def __call__(self, data: bytes, field: str, *, share: str) -> Pixels:
        """The pixels of a picture file; `share` is who shares its processes with others."""
        ...


# Uploads at a time: each may hold a whole file and its pixels in memory.
PER_VISITOR, ALTOGETHER = 2, 8
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class TakenImage:
    """A picture that was taken: its token, and its size in pixels."""

    token: str
    width: int
    height: int


class ImageIntake:
    """Takes pictures of at most `max_bytes` bytes. Lives on one event loop.

    `decode` is the sandboxed decoder: no file of a visitor is opened in this process.
    """

    def __init__(self, decode: DecodeUpload, store: UploadStore, max_bytes: int) -> None:
        self._decode = decode
        self._store = store
        self.max_bytes = max_bytes
        self._under_way: Counter[str] = Counter()
        self._turns = visitor_queue()

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """A place among the uploads under way. Raises `RateLimited` where there is none."""
        if self._under_way[owner] >= PER_VISITOR or self._under_way.total() >= ALTOGETHER:
            raise RateLimited("Other pictures are being taken in; try again in a second.", retry_after=1)
        self._under_way[owner] += 1
        try:
            yield
        finally:
            self._under_way[owner] -= 1
            if not self._under_way[owner]:
                del self._under_way[owner]

    async def take(self, owner: str, data: bytes) -> TakenImage:
        """Take a picture for `owner`, within a `place`.

        Raises `TooLarge`, `UnsupportedMedia` or `InvalidInput` naming `image_file`.
        """
        pixels = await self._decode(data, "image_file", share=owner)
        height, width = pixels.shape[:2]
        encoded = await asyncio.to_thread(self._encoded, pixels)
        return TakenImage(self._store.add(owner, encoded), width, height)

    def file(self, owner: str, token: str) -> bytes:
        """The file under a token, as it was encoded here. Raises `NotFound`."""
        return self._store.get(owner, token)

    async def work(self, owner: str, tokens: Sequence[str], make: Callable[..., T]) -> T:
        """What `make`, on a thread, makes of the pictures under tokens: each uint8, height × width × 3.

        Raises `NotFound`, `RateLimited`.
        """
        async with self._turns.hold(owner):
            pictures = [
                await self._decode(self._store.get(owner, token), "image_file", share=owner) for token in tokens
            ]
            return await asyncio.to_thread(make, *pictures)

    def forget(self, owner: str, token: str) -> None:
        """Let a picture go."""
        self._store.remove(owner, token)

    def _encoded(self, pixels: Pixels) -> bytes:
        """A PNG file; a JPEG file where that would be too large for the server's own orders."""
        file = encoded(pixels, "PNG", compress_level=1)
        return file if len(file) <= self.max_bytes else encoded(pixels, "JPEG", quality=_JPEG_QUALITY, subsampling=0)


def encoded(pixels: Pixels, kind: str, **options: int) -> bytes:
    """A file of pixels."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()
