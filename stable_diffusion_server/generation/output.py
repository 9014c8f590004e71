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
from stable_diffusion_server.generation.provenance import (
    Authorship,
    build_record,
    credentials_manifest,
    embedded_metadata,
    history_entry,
    ingredients_of,
)
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolved_output import ResolvedOutput
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest
from stable_diffusion_server.imaging import Pixels, encode_image, source_type_of, xmp_packet
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


@dataclass(frozen=True, slots=True)
class ComposedImage:
    """An image to store.

    `compose` makes its pixels (uint8, height × width × 3), `size` is width and height. `metadata` are embedded in the
    file with the packet `xmp`, `record` returns the object's record for a file of so many bytes. `authorship` is what
    its Content Credentials say.
    """

    compose: Callable[[], Pixels]
    size: tuple[int, int]
    metadata: Mapping[str, object]
    record: Callable[[int], Mapping[str, str]]
    entry: HistoryEntry
    xmp: str
    authorship: Authorship


class OutputWriter:
    """Encodes, signs, stores and records images, as `options` say; `record` must not raise."""

    def __init__(self, bucket: Bucket, record: Callable[[HistoryEntry], None], options: GenerationOptions) -> None:
        self._bucket = bucket
        self._ownership = options.ownership
        self._embed = options.embed_metadata
        self._signer = options.credentials
        self._record = record
        self._encoders = EncoderPool()

    async def write(
        self,
        resolved: ResolvedRequest,
        layout: ImageLayout,
        image: CheckedImage[DecodedPixels],
        warnings: tuple[RequestWarning, ...],
        caller: Caller,
        fetched: Mapping[str, bytes],
    ) -> StoredOutput:
        """Store the image under the resolved key; `fetched` are downloaded input images.

        Raises `StorageUnavailable`, `Forbidden`, and `InvalidInput` or `StorageRefused` for a refused key.
        """
        metadata = embedded_metadata(resolved, layout, image)
        codes = [warning.code for warning in warnings]
        inputs = ingredients_of(resolved.request, fetched)
        source_type = source_type_of(has_input_image=any(part.parent for part in inputs))
        made = ComposedImage(
            lambda: layout.compose_output(image.product.pixels),
            (layout.width, layout.height),
            metadata,
            lambda size: build_record(resolved, layout, image, codes, size),
            history_entry(resolved.key, caller.name, resolved, image.request, metadata),
            xmp_packet(source_type),
            Authorship(
                image.request.model,
                image.request.revision,
                resolved.content_digest,
                source_type,
                inputs,
                image.request.prompt,
            ),
        )
        return await self.write_image(resolved, made, caller)

    async def write_image(self, resolved: ResolvedOutput, made: ComposedImage, caller: Caller) -> StoredOutput:
        """Store an image under the resolved key. Raises the errors of `write`."""
        started = time.perf_counter()
        data = await self._encode(resolved, made, caller.share)
        record = {**made.record(len(data)), **self._ownership.owner_record(caller)}
        encoded = time.perf_counter()
        stored, created = await self._store(resolved, data, record, caller)
        if created:
            self._record(made.entry)
        timings = {"encode": encoded - started, "store": time.perf_counter() - encoded}
        return StoredOutput(stored, created, data, timings)

    async def _encode(self, resolved: ResolvedOutput, made: ComposedImage, share: str) -> bytes:
        embedded = {"full": made.metadata, "digest": {"digest": resolved.content_digest}}.get(self._embed)
        xmp = "" if self._embed == "none" else made.xmp

        signer, inputs = self._signer, [part.file for part in made.authorship.inputs]
        manifest = credentials_manifest(made.authorship, with_prompt=self._embed == "full")

        def encode() -> bytes:
            file = encode_image(made.compose(), resolved.file_format, resolved.quality, embedded, xmp)
            return file if signer is None or inputs else signer.sign(file, resolved.file_format, manifest)

        lossless = resolved.file_format is not Format.JPEG and resolved.quality == 100
        file = await self._encoders.encode(made.size[0] * made.size[1] * 3, encode, lossless=lossless)
        if signer is None or not inputs:
            return file
        return await signer.sign_edited(file, resolved.file_format, manifest, inputs, share)

    async def _store(
        self, resolved: ResolvedOutput, data: bytes, record: Mapping[str, str], caller: Caller
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
def key_errors_explained(resolved: ResolvedOutput) -> Iterator[None]:
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
