"""Enlarges stored or sent images: checks whether the result is stored, runs the upscaler on a thread, stores it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from stable_diffusion_server.concurrency import FairRequestQueue, deadline
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.executor import SubmissionContext
from stable_diffusion_server.generation.interfaces import ignore
from stable_diffusion_server.generation.layout import InputLoader
from stable_diffusion_server.generation.output import OutputWriter
from stable_diffusion_server.generation.resolved_output import ResolvedOutput, place_of, source_identities
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.results import GenerationOutcome
from stable_diffusion_server.generation.single_flight import ProgressBroadcaster, ProgressListener, SingleFlight
from stable_diffusion_server.generation.upscaled_images import (
    ResolvedUpscale,
    UpscaleOutcome,
    composed_upscale,
    upscale_result,
    upscale_warnings,
)
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.storage import Bucket
from stable_diffusion_server.types import (
    Caller,
    EngineEventKind,
    GenerationProgress,
    GenerationRequest,
    GenerationResult,
    StoredObject,
    Task,
    digest,
)

DEFAULT_UPSCALER, DEFAULT_SCALE = "embedded-2x", 2.0
# Images that are enlarged at a time, each on a thread; requests of a caller that run or wait.
_CONCURRENCY, _MAX_PER_CALLER = 2, 16


class UpscaleStopped(Exception):
    """The caller left; the thread of the upscaler ends after its tile."""


class UpscaleRunner:
    """Answers requests of `Task.UPSCALE`. For one event loop. `find` looks a resolved request up in the storage.

    Threads of their own run the upscaler, so that neither the event loop nor the engine waits for it.
    """

    def __init__(
        self,
        options: GenerationOptions,
        inputs: InputLoader,
        output: OutputWriter,
        find: Callable[[ResolvedOutput], Awaitable[StoredObject | None]],
        bucket: Bucket,
    ) -> None:
        self._upscaler = options.upscaler
        self._options = options
        self._inputs = inputs
        self._output = output
        self._find = find
        self._bucket = bucket
        self._running: SingleFlight[UpscaleOutcome] = SingleFlight()
        self._queue = FairRequestQueue(
            _CONCURRENCY, _MAX_PER_CALLER, f"{_MAX_PER_CALLER} images of yours are being enlarged already."
        )
        self._threads = ThreadPoolExecutor(max_workers=_CONCURRENCY, thread_name_prefix="upscale")

    def resolve(self, request: GenerationRequest, fetched: Mapping[str, bytes] | None = None) -> ResolvedUpscale:
        """Resolve a request; `fetched` are downloaded images. Reads files of upscalers. Raises `InvalidInput`."""
        self._options.limits.for_upscaling().check(request)
        sides = request.width, request.height
        if (sides[0] is None) != (sides[1] is None):
            raise InvalidInput("Give width and height, or neither.", field="height" if sides[0] else "width")
        if sides[0] is not None and request.scale is not None:
            raise InvalidInput("Give scale, or width and height, and not all of them.", field="scale")
        if sides[0] is not None and sides[1] is not None:
            self._options.limits.check_upscaled(sides[0], sides[1], "width")
        chosen = self._upscaler.find(request.upscaler or DEFAULT_UPSCALER, "upscaler")
        scale = None if sides[0] is not None else float(request.scale or DEFAULT_SCALE)
        identity = {"task": Task.UPSCALE, "upscaler": chosen.identity, "size": sides, "scale": scale}
        content = digest({**identity, **source_identities(request, fetched)})
        place = place_of(request, content, content, self._options.bucket_path, self._options.ownership)
        return ResolvedUpscale(
            request=request,
            seed=0,
            file_format=place.file_format,
            quality=place.quality,
            key=place.key,
            content_digest=content,
            request_digest=content,
            sent_digest=digest({**identity, **source_identities(request)}),
            source_digests=source_identities(request, fetched),
            upscaler=chosen,
        )

    async def run(
        self,
        request: GenerationRequest,
        fetched: Mapping[str, bytes],
        context: SubmissionContext,
        listener: ProgressListener,
    ) -> tuple[GenerationResult, GenerationOutcome]:
        """Return the result, and the stored object with its file if this call made it.

        Raises the errors of decoding and storing, `InvalidInput`, `RateLimited`, `DeadlineExceeded`, `OutOfMemory`.
        """
        started, caller, ownership = time.perf_counter(), context.caller, self._options.ownership
        async with deadline(request.timeout or self._options.limits.max_timeout):
            resolved = await asyncio.to_thread(self.resolve, request, None)
            if request.overwrite and not caller.has_full_access:
                ownership.check_overwrite(caller, await asyncio.to_thread(self._bucket.peek, resolved.key))
            resolved, outcome, joined = await self._join(resolved, fetched, context, listener)
        may_know = ownership.visible_record(caller, outcome.stored, named=resolved.key_is_known)
        result = upscale_result(
            resolved, outcome, joined=joined, may_know=may_know, seconds=time.perf_counter() - started
        )
        return result, GenerationOutcome(outcome.stored, data=outcome.data)

    def close(self) -> None:
        """End the threads; running tiles finish."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _join(
        self,
        resolved: ResolvedUpscale,
        fetched: Mapping[str, bytes],
        context: SubmissionContext,
        listener: ProgressListener,
    ) -> tuple[ResolvedUpscale, UpscaleOutcome, bool]:
        request = resolved.request
        if any(source.url is not None for source in request.sources):
            if resolved.key_is_known and (found := await self._find(resolved)) is not None:
                return resolved, UpscaleOutcome(found), False
            fetched = await self._inputs.fetch_files(request, fetched, context.caller)
            resolved = await asyncio.to_thread(self.resolve, request, fetched)

        def start(broadcaster: ProgressBroadcaster) -> Coroutine[Any, Any, UpscaleOutcome]:
            return self._make(resolved, fetched, context.caller, broadcaster)

        outcome, joined = await self._running.join(resolved.key, resolved.tag, start, listener)
        return resolved, outcome, joined

    async def _make(
        self, resolved: ResolvedUpscale, fetched: Mapping[str, bytes], caller: Caller, broadcaster: ProgressBroadcaster
    ) -> UpscaleOutcome:
        """Look the object up; if it is missing, decode, enlarge, encode and store the image."""
        started = time.perf_counter()
        if (found := await self._find(resolved)) is not None:
            return UpscaleOutcome(found)
        await asyncio.to_thread(self._bucket.check_capacity)
        broadcaster.on_progress(GenerationProgress(EngineEventKind.QUEUED))
        async with self._queue.hold(caller.share):
            waited = time.perf_counter()
            file, pixels = await self._inputs.decode_image(resolved.request, fetched, caller.share)
            size = self._size_of(resolved, pixels)
            enlarged = await self._enlarge(resolved.upscaler.name, pixels, size, broadcaster.on_progress)
            drawn = time.perf_counter()
            made = await asyncio.to_thread(composed_upscale, resolved, enlarged, size, file, caller)
            output = await self._output.write_image(resolved, made, caller)
        if not output.created:
            return UpscaleOutcome(output.stored)
        timings = {"queue": waited - started, "upscale": drawn - waited, **output.timings}
        warnings = upscale_warnings(resolved, pixels, size)
        return UpscaleOutcome(
            output.stored, size, output.data, warnings, {**timings, "total": time.perf_counter() - started}
        )

    def _size_of(self, resolved: ResolvedUpscale, pixels: Pixels) -> tuple[int, int]:
        """Width and height of the result. Raises `InvalidInput` if it is too large."""
        request = resolved.request
        if request.width is not None and request.height is not None:
            return request.width, request.height
        scale = request.scale or DEFAULT_SCALE
        width, height = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        self._options.limits.check_upscaled(width, height, "scale" if request.scale else resolved.source)
        return width, height

    async def enlarge(self, name: str, pixels: Pixels, size: tuple[int, int], share: str) -> Pixels:
        """Enlarge an image between two passes to `size`, width and height, with the upscaler of a name.

        Waits in the queue of the caller `share`. A cancelled call ends after its tile. Raises the errors of `run`.
        """
        async with self._queue.hold(share):
            return await self._enlarge(name, pixels, size, ignore)

    async def _enlarge(
        self, name: str, pixels: Pixels, size: tuple[int, int], watch: Callable[[GenerationProgress], None]
    ) -> Pixels:
        loop, stopped = asyncio.get_running_loop(), threading.Event()

        def report(done: int, total: int) -> None:
            if stopped.is_set():
                raise UpscaleStopped
            kind = EngineEventKind.STEP if done else EngineEventKind.STARTED
            if not loop.is_closed():
                loop.call_soon_threadsafe(watch, GenerationProgress(kind, done, total))

        enlarge = partial(self._upscaler.enlarge, name, pixels, *size, report)
        work = asyncio.ensure_future(loop.run_in_executor(self._threads, enlarge))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stopped.set()
            await asyncio.wait([work])  # for the tile that is drawn now: its memory is in use until then
            if not work.cancelled():
                work.exception()  # marks it as retrieved
            raise
