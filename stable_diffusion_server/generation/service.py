"""Generation service: cache lookup, request coalescing, input images, generation, storage, result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog

from stable_diffusion_server.concurrency import deadline
from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.generation.control_images import ControlLayout
from stable_diffusion_server.generation.detail_repair import DetailRepairer
from stable_diffusion_server.generation.executor import GenerationExecutor, SubmissionContext
from stable_diffusion_server.generation.expansion import PromptExpander
from stable_diffusion_server.generation.interfaces import DecodeImage, EngineQueue, FetchImage, ignore
from stable_diffusion_server.generation.layout import InputLoader, fields_as_sent
from stable_diffusion_server.generation.output import OutputWriter, key_errors_explained
from stable_diffusion_server.generation.request_resolution import RequestResolver
from stable_diffusion_server.generation.resolved_output import ResolvedOutput
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest, resolve_request
from stable_diffusion_server.generation.results import (
    GenerationOutcome,
    ResultCache,
    generation_warnings,
    result_of_outcome,
    rounded,
)
from stable_diffusion_server.generation.second_pass import draw_passes
from stable_diffusion_server.generation.single_flight import (
    CallbackListener,
    ProgressBroadcaster,
    ProgressListener,
    SingleFlight,
)
from stable_diffusion_server.generation.upscaling import UpscaleRunner
from stable_diffusion_server.observability import Tracing, UsageMetrics
from stable_diffusion_server.storage import Bucket, HistoryEntry, read_image
from stable_diffusion_server.types import (
    Caller,
    GenerationProgress,
    GenerationRequest,
    GenerationResult,
    StoredObject,
    Task,
)

_NO_CALLER = Caller()
_NO_FILES: Mapping[str, bytes] = {}
_CACHE_SIZE = 1024  # results of cache hits
_NOTHING_EXPANDED = PromptExpander()

_log = structlog.get_logger(__name__)


class GenerationService:
    """Answers generation requests. Concurrent equal requests share one generation; stored images are returned.

    `known` looks a key up in the existence cache without blocking. `record` receives history entries and must not
    raise. With `log_prompts` the log line of a stored image contains its prompt. `controls` makes control images.
    """

    def __init__(
        self,
        bucket: Bucket,
        queue: EngineQueue,
        count_tokens: Callable[[str, str], int],
        options: GenerationOptions,
        account: UsageMetrics | None = None,
        *,
        fetch: FetchImage,
        decode: DecodeImage,
        known: Callable[[str], StoredObject | None] = lambda key: None,
        record: Callable[[HistoryEntry], None] = lambda entry: None,
        tracing: Tracing | None = None,
        log_prompts: bool = False,
        expander: PromptExpander = _NOTHING_EXPANDED,
    ) -> None:
        self._bucket = bucket
        self._queue = queue
        self._options = options
        self._metrics = account or UsageMetrics()
        self._tracing = tracing or Tracing()
        self._log_prompts = log_prompts
        self._inputs = InputLoader(fetch, decode, options.limits.max_side)
        self._output = OutputWriter(bucket, record, options)
        self._known = known
        self._results = ResultCache(_CACHE_SIZE)
        self._requests = RequestResolver(options, expander)
        self.controls = ControlLayout(self._inputs, self._requests, options.preprocessor)
        self._generations: SingleFlight[GenerationOutcome] = SingleFlight()
        self._executor = GenerationExecutor(queue, count_tokens, options)
        self._repairer = DetailRepairer(self._executor, options)
        self._upscales = UpscaleRunner(options, self._inputs, self._output, self._find, bucket)

    async def generate(
        self,
        request: GenerationRequest,
        *,
        caller: Caller = _NO_CALLER,
        background: bool = False,
        watch: Callable[[GenerationProgress], None] = ignore,
        previews: bool | Callable[[], bool] = False,
        fetched: Mapping[str, bytes] = _NO_FILES,
        job_id: str = "",
        suspect: bool = False,
    ) -> GenerationResult:
        """Return the result of a request once its image is stored.

        `watch` receives progress on the event loop (queued, started, step), with previews if `previews`, which may be
        a function that is called at each step; no final report is sent. `fetched` are already downloaded files of the
        request's URLs, by parameter. `job_id` is set for an asynchronous job; a `suspect` runs alone on the device.

        Raises `InvalidInput`, `Forbidden`, `TooLarge`, `UnsupportedMedia`, `RemoteFetchFailed`, `QueueFull`,
        `NotReady`, `StorageUnavailable`, `DeadlineExceeded`, and the errors of the generation. Cancelling the call
        removes the request from the device, unless other calls wait for it too.
        """
        context = SubmissionContext(caller, background, job_id, suspect)
        result, _ = await self._generate_with_deadline(request, fetched, context, CallbackListener(watch, previews))
        return result

    def lookup_cached(self, request: GenerationRequest, caller: Caller = _NO_CALLER) -> GenerationResult | None:
        """Return the result of a request whose image is stored and visible to the caller, without I/O.

        `None` if the caches do not show that. Never blocks. Raises `InvalidInput`, `Forbidden`.
        """
        resolved = None if request.overwrite else self._requests.resolve_at_once(request, caller)
        if resolved is None:
            return None
        stored = self._known(resolved.key)
        if stored is None or resolved.key in self._generations or not self._options.ownership.may_know(caller, stored):
            return None
        self._metrics.record_generation("cached")
        return self._results.result_of(resolved, stored)

    async def generate_with_bytes(
        self,
        request: GenerationRequest,
        *,
        caller: Caller = _NO_CALLER,
        background: bool = False,
        watch: Callable[[GenerationProgress], None] = ignore,
        previews: bool | Callable[[], bool] = False,
        picture: Callable[[], bool] = lambda: False,
        fetched: Mapping[str, bytes] = _NO_FILES,
    ) -> tuple[GenerationResult, bytes]:
        """Return the result and the file that this request generated, even if the key was overwritten since.

        When `picture`, which is called on the engine's threads after each step, returns true, the next report has the
        unfinished image. It is stored nowhere; the generation goes on until the call is cancelled.
        """
        context, listener = SubmissionContext(caller, background), CallbackListener(watch, previews, picture)
        result, outcome = await self._generate_with_deadline(request, fetched, context, listener)
        try:
            return result, outcome.data or await self.read_file(result)
        except NotFound:  # another process deleted it; the existence cache has dropped the key by now
            result, outcome = await self._generate_with_deadline(request, fetched, context, listener)
            return result, outcome.data or await self.read_file(result)

    async def validate(self, request: GenerationRequest, caller: Caller = _NO_CALLER) -> None:
        """Raise the errors of the request's parameters, without downloads or storage lookups."""
        await self._resolve_output(await self._requests.admit(request, caller))

    async def prepare_for_storage(
        self, request: GenerationRequest, caller: Caller = _NO_CALLER
    ) -> tuple[GenerationRequest, dict[str, bytes]]:
        """Return the request to store for a later run, and the files of its URLs unless the image is already stored.

        Its prompts are expanded. A random seed is chosen now if the key is derived from the content, so that a second
        run gives the same image. Raises the errors that `generate` raises before the generation. Downloads count
        against the request's `timeout`.
        """
        request = await self._requests.admit(request, caller)
        resolved = await self._resolve_output(request)
        if request.save_path is None:
            request = replace(request, seed=resolved.seed) if request.seed == "random" else request
        elif resolved.key_is_known and await self._find(resolved) is not None:
            return request, {}
        await asyncio.to_thread(self._bucket.check_capacity)
        async with deadline(request.timeout or self._options.limits.max_timeout):
            return request, await self._inputs.fetch_files(request, _NO_FILES, caller)

    async def read_file(self, result: GenerationResult) -> bytes:
        """Return the file that is stored under a result's key now. Raises `NotFound`, `StorageUnavailable`."""
        return await asyncio.to_thread(read_image, self._bucket, result.key)

    async def is_gone(self, result: GenerationResult) -> bool:
        """Whether the object of a result was deleted; false while the storage is unavailable."""
        with suppress(StorageUnavailable):
            return self._known(result.key) is None and await asyncio.to_thread(self._bucket.peek, result.key) is None
        return False

    def check_open(self) -> None:
        """Raise `NotReady` or `QueueFull` if no request can be generated now."""
        self._queue.check_open()

    async def check_capacity(self, context: SubmissionContext) -> None:
        """Refuse early if the queue or the storage is full."""
        self._queue.check_open(context.caller.share, background=context.background)
        await asyncio.to_thread(self._bucket.check_capacity)

    def close(self) -> None:
        """Stop the threads of encoders and upscalers."""
        self._output.close()
        self._upscales.close()

    async def _resolve_output(self, request: GenerationRequest) -> ResolvedOutput:
        if request.task is Task.UPSCALE:
            return await asyncio.to_thread(self._upscales.resolve, request)
        return await self._requests.resolve(request)

    async def _generate_with_deadline(
        self,
        request: GenerationRequest,
        fetched: Mapping[str, bytes],
        context: SubmissionContext,
        listener: ProgressListener,
    ) -> tuple[GenerationResult, GenerationOutcome]:
        if request.task is Task.UPSCALE:
            return await self._upscales.run(request, fetched, context, listener)
        started, ownership, caller = time.perf_counter(), self._options.ownership, context.caller
        admitted = await self._requests.admit(request, caller, expands=not context.job_id)
        resolved = await self._requests.resolve(admitted)
        async with deadline(request.timeout or self._options.limits.max_timeout):
            if await self._executor.load_unread(resolved, self._find, context, listener):
                resolved = await self._requests.resolve(resolved.request)  # the key is final now
            if request.overwrite and not caller.has_full_access:
                ownership.check_overwrite(caller, await asyncio.to_thread(self._bucket.peek, resolved.key))
            resolved, outcome, joined = await self._coalesce(resolved, fetched, context, listener)
        seconds = time.perf_counter() - started
        result = result_of_outcome(resolved, outcome, caller, ownership, joined=joined, seconds=seconds)
        drawn = "coalesced" if joined or outcome.coalesced else "drawn"
        self._metrics.record_generation("cached" if outcome.image is None else drawn)
        return result, outcome

    async def _coalesce(
        self,
        resolved: ResolvedRequest,
        fetched: Mapping[str, bytes],
        context: SubmissionContext,
        listener: ProgressListener,
    ) -> tuple[ResolvedRequest, GenerationOutcome, bool]:
        """Join or start the generation of a key. Returns the final request, the outcome, whether it was joined.

        If the key does not depend on the input images, a stored object is returned without downloading them.
        """
        request = resolved.request
        if any(source.url is not None for source in request.sources):
            if resolved.key_is_known and (found := await self._find(resolved)) is not None:
                return resolved, GenerationOutcome(found), False
            await self.check_capacity(context)
            fetched = await self._inputs.fetch_files(request, fetched, context.caller)
            resolved = await asyncio.to_thread(resolve_request, request, self._options, fetched)

        def start(broadcaster: ProgressBroadcaster) -> Coroutine[Any, Any, GenerationOutcome]:
            return self._generate_uncached(resolved, fetched, context, broadcaster)

        with fields_as_sent(request):
            outcome, joined = await self._generations.join(resolved.key, resolved.tag, start, listener)
        return resolved, outcome, joined

    async def _find(self, resolved: ResolvedOutput) -> StoredObject | None:
        """Return the object under the key; `None` if the request overwrites it. Raises for a key the bucket refuses."""
        overwrite = resolved.request.overwrite
        known = None if overwrite else self._known(resolved.key)
        with key_errors_explained(resolved):
            found = known or await asyncio.to_thread(self._bucket.stat, resolved.key)
        return None if overwrite else found

    async def _generate_uncached(
        self,
        resolved: ResolvedRequest,
        fetched: Mapping[str, bytes],
        context: SubmissionContext,
        broadcaster: ProgressBroadcaster,
    ) -> GenerationOutcome:
        """Look the object up. If it is missing, decode the inputs, generate, encode and store."""
        started = time.perf_counter()
        with self._tracing.span("cache_lookup"):
            found = await self._find(resolved)
        if found is not None:
            return GenerationOutcome(found)
        await self.check_capacity(context)
        with self._tracing.span("prepare"):
            layout = await self._inputs.lay_out(resolved, fetched, context.caller.share)
            if resolved.parameters.controls or resolved.parameters.image_prompts:
                layout = await self.controls.with_controls(layout, resolved, fetched, context.caller.share)
            request = await asyncio.to_thread(self._executor.fit_prompts, layout.request, resolved)
        attributes: dict[str, str | int] = {"sds.model": request.model, "sds.steps": request.num_inference_steps}
        with self._tracing.span("generate", attributes) as span:
            drawn = await draw_passes(
                self._executor, self._upscales.enlarge, resolved, layout, request, context, broadcaster
            )
            if resolved.request.repairs:
                drawn = await self._repairer.repair(resolved, drawn, context, broadcaster)
            image = drawn.image
            span.set_attributes({f"sds.seconds.{stage}": seconds for stage, seconds in image.timings.items()})
        warnings = (*drawn.layout.warnings, *image.warnings, *generation_warnings(resolved, layout, request, image))
        with self._tracing.span("store"):
            output = await self._output.write(resolved, drawn.layout, image, warnings, context.caller, fetched)
        timings = {**image.timings, **output.timings, "total": time.perf_counter() - started}
        self._metrics.record_stored(timings)
        for warning in image.warnings:
            self._metrics.record_quality_check(warning.code)
        if image.product.redecoded:
            self._metrics.record_quality_check("redecoded")
        if not output.created:
            _log.info("another process stored this name first", name=resolved.key)
            return GenerationOutcome(output.stored)
        prompt = {"prompt": request.prompt} if self._log_prompts else {}
        facts = {"model": request.model, "bytes": len(output.data), **prompt, **rounded(timings)}
        _log.info("picture stored", name=resolved.key, **facts)
        return GenerationOutcome(output.stored, drawn.layout, image, output.data, drawn.coalesced, warnings, timings)
