"""Accepts uploaded images: decodes them in the sandbox, re-encodes them and stores them by token."""

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
from stable_diffusion_server.ui.client import visitor_queue
from stable_diffusion_server.ui.upload_store import UploadStore

T = TypeVar("T")
Pixels = NDArray[np.uint8]


class DecodeUpload(Protocol):
    """The sandboxed decoder."""

    async def __call__(self, data: bytes, field: str, *, share: str) -> Pixels:
        """Return the pixels of an image file; `share` names the caller, for fair limits on the decoder processes."""
        ...


# Maximum concurrent uploads: each may hold a whole file and its pixels in memory.
PER_VISITOR, ALTOGETHER = 2, 8
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class TakenImage:
    """A stored upload: its token, and its size in pixels."""

    token: str
    width: int
    height: int


class ImageIntake:
    """Accepts images of at most `max_bytes` bytes. For one event loop.

    `decode` is the sandboxed decoder: this process never opens visitors' files.
    """

    def __init__(self, decode: DecodeUpload, store: UploadStore, max_bytes: int) -> None:
        self._decode = decode
        self._store = store
        self.max_bytes = max_bytes
        self._uploads: Counter[str] = Counter()
        self._turns = visitor_queue()

    @contextmanager
    def place(self, owner: str) -> Iterator[None]:
        """Count one upload while it runs. Raises `RateLimited` if too many uploads run."""
        if self._uploads[owner] >= PER_VISITOR or self._uploads.total() >= ALTOGETHER:
            raise RateLimited("Other pictures are being taken in; try again in a second.", retry_after=1)
        self._uploads[owner] += 1
        try:
            yield
        finally:
            self._uploads[owner] -= 1
            if not self._uploads[owner]:
                del self._uploads[owner]

    async def take(self, owner: str, data: bytes) -> TakenImage:
        """Store an image for `owner`. Call it inside `place`.

        Raises `TooLarge`, `UnsupportedMedia` or `InvalidInput` for the field `image_file`.
        """
        pixels = await self._decode(data, "image_file", share=owner)
        height, width = pixels.shape[:2]
        encoded = await asyncio.to_thread(self._encoded, pixels)
        return TakenImage(self._store.add(owner, encoded), width, height)

    def file(self, owner: str, token: str) -> bytes:
        """Return the re-encoded file of a token. Raises `NotFound`."""
        return self._store.get(owner, token)

    async def work(self, owner: str, tokens: Sequence[str], make: Callable[..., T]) -> T:
        """Call `make` on a thread with the pixels of tokens, each uint8, height × width × 3, and return its result.

        Raises `NotFound`, `RateLimited`.
        """
        async with self._turns.hold(owner):
            pictures = [
                await self._decode(self._store.get(owner, token), "image_file", share=owner) for token in tokens
            ]
            return await asyncio.to_thread(make, *pictures)

    def forget(self, owner: str, token: str) -> None:
        """Delete an image."""
        self._store.remove(owner, token)

    def _encoded(self, pixels: Pixels) -> bytes:
        """Encode as PNG, or as JPEG if the PNG exceeds the server's own limit."""
        file = encoded(pixels, "PNG", compress_level=1)
        return file if len(file) <= self.max_bytes else encoded(pixels, "JPEG", quality=_JPEG_QUALITY, subsampling=0)


def encoded(pixels: Pixels, kind: str, **options: int) -> bytes:
    """Encode pixels as an image file."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, kind, **options)
    return target.getvalue()
