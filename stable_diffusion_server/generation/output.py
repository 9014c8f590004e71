"""What was drawn becomes a file, is stored, and is written down. Knows no drawing and no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from stable_diffusion_server.errors import InvalidInput, StorageRefused
from stable_diffusion_server.generation.encoder_pool import EncoderPool
from stable_diffusion_server.generation.layout import ImageLayout
from stable_diffusion_server.generation.ownership import Ownership
from stable_diffusion_server.generation.provenance import build_record, embedded_metadata, history_entry
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.imaging import encode_image, source_type_of, xmp_packet
from stable_diffusion_server.storage import Bucket, HistoryEntry
from stable_diffusion_server.types import Caller, Format, RequestWarning, StoredObject

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What is stored, whether by this call, the file's bytes, and seconds by stage."""

    stored: StoredObject
    won: bool
    data: bytes
    timings: dict[str, float]


class OutputWriter:
    """Encodes, stores and records. `embed` is full, digest or none; `record` takes an entry and never fails."""

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
        plan: ResolvedRequest,
        scene: ImageLayout,
        judged: CheckedImage[DecodedPixels],
        warnings: tuple[RequestWarning, ...],
        caller: Caller,
    ) -> StoredOutput:
        """Store the picture under the plan's key.

        Raises `StorageUnavailable`, `Forbidden`, and `InvalidInput` or `StorageRefused` for a name that is refused.
        """
        started = time.perf_counter()
        inscription = embedded_metadata(plan, scene, judged)
        told: dict[str, Mapping[str, object]] = {"full": inscription, "digest": {"digest": plan.content_digest}}
        inside = told.get(self._embed)
        source_type = source_type_of(has_input_image=plan.request.image is not None)
        xmp = "" if self._embed == "none" else xmp_packet(source_type)

        def encoded() -> bytes:
            return encode_image(
                scene.compose_output(judged.product.pixels), plan.file_format, plan.quality, inside, xmp
            )

        lossless = plan.file_format is not Format.JPEG and plan.quality == 100
        data = await self._encoders.encode(scene.width * scene.height * 3, encoded, lossless=lossless)
        record = build_record(plan, scene, judged, (warning.code for warning in warnings), len(data))
        record |= self._ownership.owner_record(caller)
        write = self._bucket.overwrite if plan.request.overwrite else self._bucket.create
        before = time.perf_counter()
        if plan.request.overwrite and not caller.has_full_access:
            # Looked at again: another caller may have taken the name while this was drawn.
            self._ownership.check_overwrite(caller, await asyncio.to_thread(self._bucket.peek, plan.key))
        written = partial(write, plan.key, data, plan.file_format.content_type, record)
        with owner_of_key(plan):
            answer = await shield_until_done(asyncio.to_thread(written))
        stored, won = answer if isinstance(answer, tuple) else (answer, True)
        if won:
            self._record(history_entry(plan.key, caller.name, plan, judged.request, inscription))
        now = time.perf_counter()
        return StoredOutput(stored, won, data, {"encode": before - started, "store": now - before})

    def close(self) -> None:
        """Let go of the encoding threads."""
        self._encoders.close()


@contextmanager
def owner_of_key(plan: ResolvedRequest) -> Iterator[None]:
    """Blame a name that the bucket refuses on its caller, who may choose another, or on the storage if it chose none.

    Raises `StorageRefused` then.
    """
    try:
        yield
    except InvalidInput as error:
        if plan.request.save_path is not None:
            raise
        sentence = error.detail.removeprefix("save_path ")
        raise StorageRefused(f"A name made by this server {sentence}") from error


async def shield_until_done(work: Coroutine[Any, Any, T]) -> T:
    """The result of something that a thread does and no one can stop: whoever is cancelled waits for its end first.

    Else a write that was given up would land after a later one under the same name.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen, and nobody is left to be told
        raise
