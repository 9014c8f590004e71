"""One order's way: exists?, fetch, join a flight, decode, draw, encode, store, receipt. Knows no HTTP and no torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import structlog

from stable_diffusion_server.concurrency import deadline
from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.generation.executor import EngineQueue, GenerationExecutor, SubmissionContext
from stable_diffusion_server.generation.interfaces import DecodeImage, FetchImage, ignore
from stable_diffusion_server.generation.layout import ImageLayout, lay_out_images
from stable_diffusion_server.generation.output import OutputWriter, owner_of_key
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import GenerationOptions, ResolvedRequest, resolve_request, spec_for
from stable_diffusion_server.generation.results import (
    result_for_other_caller,
    result_of_generated,
    result_of_stored,
    rounded,
)
from stable_diffusion_server.generation.single_flight import (
    CallbackListener,
    ProgressBroadcaster,
    ProgressListener,
    SingleFlight,
)
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.observability import Tracing, UsageMetrics
from stable_diffusion_server.storage import Bucket, HistoryEntry, read_image
from stable_diffusion_server.types import (
    Caller,
    GenerationProgress,
    GenerationRequest,
    GenerationResult,
    ImageInput,
    RequestWarning,
    StoredObject,
)

_ANYONE = Caller()
_PLANS = 1024
_NOTHING: Mapping[str, bytes] = {}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationOutcome:
    """What an effort under a key came to. `scene` and `judged` are what was drawn, `None` when the object was there.

    `data` is the file that was stored; `twin` tells that the drawing was shared with an effort under another key.
    """

    stored: StoredObject
    layout: ImageLayout | None = None
    image: CheckedImage[DecodedPixels] | None = None
    data: bytes = b""
    coalesced: bool = False
    warnings: tuple[RequestWarning, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


class GenerationService:
    """Fulfils orders: at most one generation for any number of equal ones at a time, and none for what is stored.

    With `log_prompts` the line that tells of a stored picture holds its prompt.
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
    ) -> None:
        self._bucket = bucket
        self._queue = queue
        self._options = options
        self._account = account or UsageMetrics()
        self._tracing = tracing or Tracing()
        self._log_prompts = log_prompts
        self._fetch = fetch
        self._decode = decode
        self._keeping = OutputWriter(bucket, options.embed_metadata, record, options.ownership)
        self._known = known
        self._told: dict[str, tuple[ResolvedRequest, StoredObject, GenerationResult]] = {}
        # The same words come again and again; planning them is pure, but for what the order's model is.
        self._plans = lru_cache(_PLANS)(lambda order, facts: resolve_request(order, options))
        self._fetching: SingleFlight[bytes] = SingleFlight()
        self._storing: SingleFlight[GenerationOutcome] = SingleFlight()
        self._drawing = GenerationExecutor(queue, count_tokens, options)

    async def generate(
        self,
        order: GenerationRequest,
        *,
        caller: Caller = _ANYONE,
        background: bool = False,
        watch: Callable[[GenerationProgress], None] = ignore,
        previews: bool | Callable[[], bool] = False,
        fetched: Mapping[str, bytes] = _NOTHING,
        job_id: str = "",
        suspect: bool = False,
    ) -> GenerationResult:
        """The receipt for an order, once its picture is stored.

        `watch` is called on the event loop while it waits and is drawn (queued, started, step); how it ends is for
        this call to say. `previews`, which may be asked again at each step, has small pictures come with the steps.
        `fetched` are the files at the order's addresses, by parameter, as far as they are known. `job_id` is the
        accepted job's, and a `suspect` has the device for itself.

        Raises `InvalidInput`, `TooLarge`, `UnsupportedMedia`, `RemoteFetchFailed`, `QueueFull`, `NotReady`,
        `StorageUnavailable`, `DeadlineExceeded`, and what drawing raises. Cancelling the call takes the job off the
        device, unless others wait for it too.
        """
        whom, listener = SubmissionContext(caller, background, job_id, suspect), CallbackListener(watch, previews)
        return (await self._generate_with_deadline(order, fetched, whom, listener))[0]

    def lookup_cached(self, order: GenerationRequest, caller: Caller = _ANYONE) -> GenerationResult | None:
        """The receipt for an order whose picture is known to be stored, and which the caller may know.

        `None` where that has to be found out. Blocks for nothing. Raises `InvalidInput`.
        """
        if order.sources or order.loras or order.overwrite or order.seed == "random":
            return None
        plan = self._planned(order)
        stored = self._known(plan.key)
        if stored is None or plan.key in self._storing or not self._options.ownership.may_know(caller, stored):
            return None
        self._account.record_generation("cached")
        # Made of the very same two things, the receipt is the same too.
        plan_told, stored_told, receipt = self._told.get(plan.key, (None, None, None))
        if receipt is None or plan_told is not plan or stored_told is not stored:
            if len(self._told) >= _PLANS:
                self._told.clear()
            receipt = result_of_stored(plan, stored)
            self._told[plan.key] = plan, stored, receipt
        return receipt

    async def generate_with_bytes(
        self,
        order: GenerationRequest,
        *,
        caller: Caller = _ANYONE,
        background: bool = False,
        watch: Callable[[GenerationProgress], None] = ignore,
        previews: bool | Callable[[], bool] = False,
        fetched: Mapping[str, bytes] = _NOTHING,
    ) -> tuple[GenerationResult, bytes]:
        """The same with the file itself: the one this order drew, whatever is stored under its name since."""
        whom, listener = SubmissionContext(caller, background), CallbackListener(watch, previews)
        receipt, outcome = await self._generate_with_deadline(order, fetched, whom, listener)
        try:
            return receipt, outcome.data or await self.read_file(receipt)
        except NotFound:  # remembered as stored, and deleted by others: forgotten by now, so it is drawn
            receipt, outcome = await self._generate_with_deadline(order, fetched, whom, listener)
            return receipt, outcome.data or await self.read_file(receipt)

    async def validate(self, order: GenerationRequest) -> None:
        """Raise what an order is refused for by itself, before anything it names is looked up."""
        await self._resolved(order)

    async def prepare_for_storage(
        self, order: GenerationRequest, caller: Caller = _ANYONE
    ) -> tuple[GenerationRequest, dict[str, bytes]]:
        """The order as it can be kept and fulfilled later, and the files at its addresses, unless it is stored.

        A name made from the content has its random seed chosen, so that drawing it again is drawing the same. Raises
        what `fulfil` raises before anything is drawn; waiting for addresses counts against the order's `timeout`.
        """
        plan = await self._resolved(order)
        if order.save_path is None:
            order = replace(order, seed=plan.seed) if order.seed == "random" else order
        elif plan.key_is_known and await self._find(plan) is not None:
            return order, {}
        await asyncio.to_thread(self._bucket.check_capacity)
        async with deadline(order.timeout or self._options.limits.max_timeout):
            return order, await self._files_of(order, _NOTHING, caller)

    async def read_file(self, receipt: GenerationResult) -> bytes:
        """The file that is stored under a receipt's name now. Raises `NotFound`, `StorageUnavailable`."""
        return await asyncio.to_thread(read_image, self._bucket, receipt.key)

    async def is_gone(self, receipt: GenerationResult) -> bool:
        """Whether nothing is stored under a receipt's name any more; not while the storage cannot tell."""
        with suppress(StorageUnavailable):
            return self._known(receipt.key) is None and await asyncio.to_thread(self._bucket.peek, receipt.key) is None
        return False

    def check_open(self) -> None:
        """Raise `NotReady` or `QueueFull` if nothing can be drawn now."""
        self._queue.check_open()

    async def _resolved(self, order: GenerationRequest) -> ResolvedRequest:
        # Files are hashed, adapters' files read; words alone take less time than a thread to take them to.
        if order.sources or order.loras:
            return await asyncio.to_thread(resolve_request, order, self._options)
        return resolve_request(order, self._options) if order.seed == "random" else self._planned(order)

    def _planned(self, order: GenerationRequest) -> ResolvedRequest:
        """The plan of an order without pictures and adapters, whose model may become another one by being loaded."""
        return self._plans(order, spec_for(order, self._options))

    async def _generate_with_deadline(
        self,
        order: GenerationRequest,
        fetched: Mapping[str, bytes],
        whom: SubmissionContext,
        listener: ProgressListener,
    ) -> tuple[GenerationResult, GenerationOutcome]:
        started = time.perf_counter()
        plan = await self._resolved(order)
        async with deadline(order.timeout or self._options.limits.max_timeout):
            if order.overwrite and not whom.caller.has_full_access:
                there = await asyncio.to_thread(self._bucket.peek, plan.key)
                self._options.ownership.check_overwrite(whom.caller, there)
            plan, outcome, shared = await self._coalesce(plan, fetched, whom, listener)
        may_know = self._options.ownership.visible_record(whom.caller, outcome.stored, named=plan.key_is_known)
        if outcome.layout is None or outcome.image is None:
            self._account.record_generation("cached")
            found, seconds = result_of_stored(plan, outcome.stored), time.perf_counter() - started
            return (found if may_know else result_for_other_caller(plan, found, seconds)), outcome
        twin = shared or outcome.coalesced
        self._account.record_generation("coalesced" if twin else "drawn")
        # The effort under another name was perhaps another caller's.
        twin = twin and may_know and (shared or self._options.ownership.keyed is None or whom.caller.has_full_access)
        made = (outcome.stored, outcome.layout, outcome.image, outcome.warnings, outcome.timings)
        return result_of_generated(plan, *made, coalesced=twin), outcome

    def close(self) -> None:
        """Let go of the encoding threads."""
        self._keeping.close()

    async def _coalesce(
        self, plan: ResolvedRequest, fetched: Mapping[str, bytes], whom: SubmissionContext, listener: ProgressListener
    ) -> tuple[ResolvedRequest, GenerationOutcome, bool]:
        """The plan as far as it had to be taken, the object, and whether the effort was another caller's.

        What is stored under a name that needs no look at the pictures is answered without fetching them.
        """
        order = plan.request
        if any(source.url is not None for source in order.sources):
            if plan.key_is_known and (found := await self._find(plan)) is not None:
                return plan, GenerationOutcome(found), False
            await self.check_capacity(whom)
            fetched = await self._files_of(order, fetched, whom.caller)
            plan = await asyncio.to_thread(resolve_request, order, self._options, fetched)

        def start(audience: ProgressBroadcaster) -> Coroutine[Any, Any, GenerationOutcome]:
            return self._generate_uncached(plan, fetched, whom, audience)

        outcome, shared = await self._storing.join(plan.key, plan.tag, start, listener)
        return plan, outcome, shared

    async def check_capacity(self, whom: SubmissionContext) -> None:
        """Refuse before the work that a full queue, or a storage without room, would throw away."""
        self._queue.check_open(whom.caller.share, background=whom.background)
        await asyncio.to_thread(self._bucket.check_capacity)

    async def _files_of(
        self, order: GenerationRequest, fetched: Mapping[str, bytes], caller: Caller
    ) -> dict[str, bytes]:
        """The files at an order's addresses, by parameter, those that are missing fetched."""
        remote = [source for source in order.sources if source.url is not None and source.parameter not in fetched]
        data = await asyncio.gather(*(self._bytes_of(source, caller.share) for source in remote))
        return {**fetched, **{source.parameter: file for source, file in zip(remote, data, strict=True)}}

    async def _bytes_of(self, source: ImageInput, share: str) -> bytes:
        """The file at a URL; a caller who wants it several times at the same time shares one download.

        Not with other callers, since a download waits for its turn among those of the caller who began it.
        """
        url, field = source.url or "", source.parameter
        data, _ = await self._fetching.join(f"{share} {url}", field, lambda _: self._fetch(url, field, share=share))
        return data

    async def _find(self, plan: ResolvedRequest) -> StoredObject | None:
        """What is stored under the key; asked for when it is to be overwritten too, since that refuses bad names."""
        known = None if plan.request.overwrite else self._known(plan.key)
        with owner_of_key(plan):
            found = known or await asyncio.to_thread(self._bucket.stat, plan.key)
        return None if plan.request.overwrite else found

    async def _generate_uncached(
        self,
        plan: ResolvedRequest,
        fetched: Mapping[str, bytes],
        whom: SubmissionContext,
        audience: ProgressBroadcaster,
    ) -> GenerationOutcome:
        """Find the object or make it: exists? → decode → draw → encode → create."""
        started = time.perf_counter()
        with self._tracing.span("cache_lookup"):
            found = await self._find(plan)
        if found is not None:
            return GenerationOutcome(found)
        await self.check_capacity(whom)
        with self._tracing.span("prepare"):
            scene = await self._scene(plan, fetched, whom.caller.share)
            job = await asyncio.to_thread(self._drawing.fit_prompts, scene.request)
        with self._tracing.span("generate", {"sds.model": job.model, "sds.steps": job.num_inference_steps}) as span:
            judged, twin = await self._drawing.generate(job, whom, audience)
            span.set_attributes({f"sds.seconds.{stage}": seconds for stage, seconds in judged.timings.items()})
        timings = dict(judged.timings)
        warnings = [*scene.warnings, *judged.warnings]
        if job.prompt != scene.request.prompt:
            limit = plan.parameters.spec.text_tokens
            warnings.append(RequestWarning("prompt-shortened", f"{job.model} reads {limit} tokens; see prompt_used."))
        if judged.product.redecoded:
            warnings.append(RequestWarning("redecoded", "The decoder overflowed and ran again in full precision."))
        with self._tracing.span("store"):
            kept = await self._keeping.write(plan, scene, judged, tuple(warnings), whom.caller)
        timings.update(kept.timings, total=time.perf_counter() - started)
        self._account.record_stored(timings)
        for warned in (*judged.warnings, *(warnings[-1:] if judged.product.redecoded else ())):
            self._account.record_quality_check(warned.code)
        if not kept.won:
            _log.info("another process stored this name first", name=plan.key)
            return GenerationOutcome(kept.stored)
        words = {"prompt": job.prompt} if self._log_prompts else {}
        _log.info("picture stored", name=plan.key, model=job.model, bytes=len(kept.data), **words, **rounded(timings))
        return GenerationOutcome(kept.stored, scene, judged, kept.data, twin, tuple(warnings), timings)

    async def _scene(self, plan: ResolvedRequest, fetched: Mapping[str, bytes], share: str) -> ImageLayout:
        """The plan with its pictures decoded and laid onto the canvas."""

        async def pixels_of(source: ImageInput | None) -> Pixels | None:
            if source is None:
                return None
            data = source.data if source.data is not None else fetched[source.parameter]
            return await self._decode(data, source.parameter, transparency=source.transparency, share=share)

        image, mask = await asyncio.gather(pixels_of(plan.request.image), pixels_of(plan.request.mask))
        return await asyncio.to_thread(lay_out_images, plan, image, mask)
