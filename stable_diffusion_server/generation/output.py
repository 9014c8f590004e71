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
from stable_diffusion_server.generation.encoder_pool import Encoders
from stable_diffusion_server.generation.layout import Scene
from stable_diffusion_server.generation.ownership import Ownership
from stable_diffusion_server.generation.provenance import entry_of, inscription_of, record_of
from stable_diffusion_server.generation.quality import DrawnPicture, Judged
from stable_diffusion_server.generation.resolver import Plan
from stable_diffusion_server.imaging.digital_source_type import source_type_of, xmp_packet
from stable_diffusion_server.imaging.processing import encode
from stable_diffusion_server.storage.api import Bucket
from stable_diffusion_server.storage.history.entries import Entry
from stable_diffusion_server.types import Caller, Format, Stored, Warned

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """What is stored, whether by this call, the file's bytes, and seconds by stage."""

    stored: Stored
    won: bool
    data: bytes
    timings: dict[str, float]


class Keeping:
    """Encodes, stores and records. `embed` is full, digest or none; `record` takes an entry and never fails."""

    def __init__(self, bucket: Bucket, embed: str, record: Callable[[Entry], None], ownership: Ownership) -> None:
        self._bucket = bucket
        self._ownership = ownership
        self._embed = embed
        self._record = record
        self._encoders = Encoders()

    async def keep(
        self, plan: Plan, scene: Scene, judged: Judged[DrawnPicture], warnings: tuple[Warned, ...], caller: Caller
    ) -> Kept:
        """Store the picture under the plan's key.

        Raises `StorageUnavailable`, `Forbidden`, and `InvalidInput` or `StorageRefused` for a name that is refused.
        """
        started = time.perf_counter()
        inscription = inscription_of(plan, scene, judged)
        told: dict[str, Mapping[str, object]] = {"full": inscription, "digest": {"digest": plan.content}}
        inside = told.get(self._embed)
        source_type = source_type_of(has_input_image=plan.order.image is not None)
        xmp = "" if self._embed == "none" else xmp_packet(source_type)

        def encoded() -> bytes:
            return encode(scene.finished(judged.product.pixels), plan.file_format, plan.quality, inside, xmp)

        lossless = plan.file_format is not Format.JPEG and plan.quality == 100
        data = await self._encoders.encode(scene.width * scene.height * 3, encoded, lossless=lossless)
        record = record_of(plan, scene, judged, (warning.code for warning in warnings), len(data))
        record |= self._ownership.record_of(caller)
        write = self._bucket.overwrite if plan.order.overwrite else self._bucket.create
        before = time.perf_counter()
        if plan.order.overwrite and not caller.manages:
            # Looked at again: another caller may have taken the name while this was drawn.
            self._ownership.check_overwrite(caller, await asyncio.to_thread(self._bucket.look, plan.key))
        written = partial(write, plan.key, data, plan.file_format.content_type, record)
        with whose_name(plan):
            answer = await to_its_end(asyncio.to_thread(written))
        stored, won = answer if isinstance(answer, tuple) else (answer, True)
        if won:
            self._record(entry_of(plan.key, caller.name, plan, judged.job, inscription))
        now = time.perf_counter()
        return Kept(stored, won, data, {"encode": before - started, "store": now - before})

    def close(self) -> None:
        """Let go of the encoding threads."""
        self._encoders.close()


@contextmanager
def whose_name(plan: Plan) -> Iterator[None]:
    """Blame a name that the bucket refuses on its caller, who may choose another, or on the storage if it chose none.

    Raises `StorageRefused` then.
    """
    try:
        yield
    except InvalidInput as error:
        if plan.order.save_path is not None:
            raise
        sentence = error.detail.removeprefix("save_path ")
        raise StorageRefused(f"A name made by this server {sentence}") from error


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
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
