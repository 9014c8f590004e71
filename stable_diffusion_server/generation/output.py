"""Output: encodes an image on worker threads, stores it, and writes its history entry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from stable_diffusion_server.errors import InvalidInput, StorageRefused
from stable_diffusion_server.generation.layout import ImageLayout
from stable_diffusion_server.generation.permissions import Ownership
from stable_diffusion_server.generation.provenance import build_record, embedded_metadata, history_entry
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.imaging import encode_image, source_type_of, xmp_packet
from stable_diffusion_server.storage import Bucket, HistoryEntry
from stable_diffusion_server.types import Caller, Format, RequestWarning, StoredObject

T = TypeVar("T")

_THREADS = 2
# Images with more bytes of pixels than this are large (about 0.5 s to encode); lossless encoding counts four times.
_LARGE_BYTES = 12_582_912
_LOSSLESS_FACTOR = 4


class EncoderPool:
    """Two encoder threads. Large images use only one of them, so that they never delay small ones.

    For one event loop.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="encode")
        self._large = asyncio.Semaphore(_THREADS - 1)

    async def encode(self, size: int, encode: Callable[[], bytes], *, lossless: bool = False) -> bytes:
        """Return the result of `encode`, for an image of `size` bytes of pixels."""
        loop = asyncio.get_running_loop()
        if size * (_LOSSLESS_FACTOR if lossless else 1) <= _LARGE_BYTES:
            return await loop.run_in_executor(self._threads, encode)
        async with self._large:
            # The thread continues if the caller is cancelled, so hold the semaphore until the thread ends.
            work = asyncio.ensure_future(loop.run_in_executor(self._threads, encode))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise

    def close(self) -> None:
        """Stop the threads; running encodings finish."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """The stored object, whether this call created it, the file's bytes, and seconds per stage."""

    stored: StoredObject
    created: bool
    data: bytes
    timings: dict[str, float]


class OutputWriter:
    """Encodes, stores and records images. `embed` is full, digest or none; `record` must not raise."""

    def __init__(
        self, bucket: Bucket, embed: str, record: Callable[[HistoryEntry], None], ownership: Ownership
    ) -> None:
        self._bucket = bucket
        self._ownership = ownership
        self._embed = embed
        self._record = record
        self._encoders = EncoderPool()

    async def write(
        self,
        resolved: ResolvedRequest,
        layout: ImageLayout,
        image: CheckedImage[DecodedPixels],
        warnings: tuple[RequestWarning, ...],
        caller: Caller,
    ) -> StoredOutput:
        """Store the image under the resolved key.

        Raises `StorageUnavailable`, `Forbidden`, and `InvalidInput` or `StorageRefused` for a refused key.
        """
        started = time.perf_counter()
        metadata = embedded_metadata(resolved, layout, image)
        data = await self._encode(resolved, layout, image, metadata)
        record = build_record(resolved, layout, image, (warning.code for warning in warnings), len(data))
        record |= self._ownership.owner_record(caller)
        encoded = time.perf_counter()
        stored, created = await self._store(resolved, data, record, caller)
        if created:
            self._record(history_entry(resolved.key, caller.name, resolved, image.request, metadata))
        timings = {"encode": encoded - started, "store": time.perf_counter() - encoded}
        return StoredOutput(stored, created, data, timings)

    async def _encode(
        self,
        resolved: ResolvedRequest,
        layout: ImageLayout,
        image: CheckedImage[DecodedPixels],
        metadata: Mapping[str, object],
    ) -> bytes:
        embedded = {"full": metadata, "digest": {"digest": resolved.content_digest}}.get(self._embed)
        source_type = source_type_of(has_input_image=resolved.request.image is not None)
        xmp = "" if self._embed == "none" else xmp_packet(source_type)

        def encode() -> bytes:
            pixels = layout.compose_output(image.product.pixels)
            return encode_image(pixels, resolved.file_format, resolved.quality, embedded, xmp)

        lossless = resolved.file_format is not Format.JPEG and resolved.quality == 100
        return await self._encoders.encode(layout.width * layout.height * 3, encode, lossless=lossless)

    async def _store(
        self, resolved: ResolvedRequest, data: bytes, record: Mapping[str, str], caller: Caller
    ) -> tuple[StoredObject, bool]:
        overwrite = resolved.request.overwrite
        if overwrite and not caller.has_full_access:
            # Checked again: another caller may have created the object during generation.
            self._ownership.check_overwrite(caller, await asyncio.to_thread(self._bucket.peek, resolved.key))
        write = self._bucket.overwrite if overwrite else self._bucket.create
        work = partial(write, resolved.key, data, resolved.file_format.content_type, record)
        with key_errors_explained(resolved):
            answer = await shield_until_done(asyncio.to_thread(work))
        return answer if isinstance(answer, tuple) else (answer, True)

    def close(self) -> None:
        """Stop the encoder threads."""
        self._encoders.close()


@contextmanager
def key_errors_explained(resolved: ResolvedRequest) -> Iterator[None]:
    """Pass `InvalidInput` on if the caller chose the key; raise `StorageRefused` instead if the server chose it."""
    try:
        yield
    except InvalidInput as error:
        if resolved.request.save_path is not None:
            raise
        sentence = error.detail.removeprefix("save_path ")
        raise StorageRefused(f"A name made by this server {sentence}") from error


async def shield_until_done(work: Coroutine[Any, Any, T]) -> T:
    """Await blocking work to completion even if the caller is cancelled.

    Otherwise an abandoned write could finish after a newer write to the same key.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved: no caller is left
        raise
