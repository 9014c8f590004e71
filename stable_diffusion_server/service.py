"""One order's way: resolve, exists?, join a flight, draw, encode, store, receipt. Knows no HTTP and no torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from stable_diffusion_server.bucket_api import Bucket
from stable_diffusion_server.engine import Drawing, Ticket
from stable_diffusion_server.errors import DeadlineExceeded
from stable_diffusion_server.flights import Flights
from stable_diffusion_server.image_processing import Pixels, encode, to_size
from stable_diffusion_server.orders import Job, Order, Receipt, Stored, Warned, job_facts, picture_digest
from stable_diffusion_server.prompts import shorten_too_long_text
from stable_diffusion_server.resolving import Options, Plan, resolve

_log = structlog.get_logger(__name__)


class DrawnPicture(Protocol):
    """What the engine hands back, as far as it has to be known here."""

    @property
    def pixels(self) -> Pixels:
        """The picture at the canvas's size."""

    @property
    def redecoded(self) -> bool:
        """Whether the decoder had to run again in full precision."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What an effort under a key came to. `job` is what was drawn, `None` when the object was there already."""

    stored: Stored
    job: Job | None
    warnings: tuple[Warned, ...] = ()
    timings: Mapping[str, float] | None = None


class Service:
    """Fulfils orders: at most one generation for any number of equal ones at a time, and none for what is stored."""

    def __init__(
        self,
        bucket: Bucket,
        submit: Callable[[Job], Ticket[DrawnPicture]],
        count_tokens: Callable[[str, str], int],
        options: Options,
        answered: Callable[[str], None] = lambda source: None,
    ) -> None:
        self._bucket = bucket
        self._submit = submit
        self._count_tokens = count_tokens
        self._options = options
        self._answered = answered
        self._storing: Flights[_Outcome] = Flights()
        self._drawing: Flights[Drawing[DrawnPicture]] = Flights()

    async def fulfil(self, order: Order) -> Receipt:
        """The receipt for an order, once its picture is stored.

        Raises `InvalidInput`, `Busy`, `NotReady`, `StorageUnavailable`, `DeadlineExceeded`, and what drawing raises.
        Cancelling the call takes the job off the device, unless others wait for it too.
        """
        plan = resolve(order, self._options)
        timeout = order.timeout or self._options.limits.max_timeout
        try:
            async with asyncio.timeout(timeout) as deadline:
                outcome, shared = await self._storing.join(plan.key, plan.tag, lambda: self._effort(plan))
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"The picture was not stored within {timeout:g} seconds.") from error
        self._answered("cached" if outcome.job is None else "coalesced" if shared else "drawn")
        if outcome.job is None:
            return _receipt_from_record(plan, outcome.stored)
        return _receipt(plan, outcome.job, outcome, coalesced=shared)

    async def read(self, key: str) -> tuple[bytes, str]:
        """The bytes of a stored picture and their media type. Raises `NotFound`."""
        data = await asyncio.to_thread(self._bucket.read, key)
        stored = await asyncio.to_thread(self._bucket.stat, key)
        return data, stored.content_type if stored else "application/octet-stream"

    async def _effort(self, plan: Plan) -> _Outcome:
        """Find the object or make it: exists? → draw → encode → create."""
        started = time.perf_counter()
        if not plan.order.overwrite:
            found = await asyncio.to_thread(self._bucket.stat, plan.key)
            if found is not None:
                return _Outcome(found, job=None)
        job = await asyncio.to_thread(self._fit_prompt, plan)
        drawing, _ = await self._drawing.join(picture_digest(job), "", lambda: self._draw(job))
        timings = dict(drawing.timings)
        warnings = list(plan.warnings)
        if job.prompt != plan.job.prompt:
            limit = plan.facts.text_tokens
            warnings.append(Warned("prompt-shortened", f"{job.model} reads {limit} tokens; see prompt_used."))
        if drawing.product.redecoded:
            warnings.append(Warned("redecoded", "The decoder overflowed and ran again in full precision."))
        before = time.perf_counter()
        data = await asyncio.to_thread(self._encode, plan, job, drawing.product.pixels)
        timings["encode"] = time.perf_counter() - before
        before = time.perf_counter()
        stored, won = await asyncio.to_thread(self._store, plan, job, data)
        timings["store"] = time.perf_counter() - before
        timings["total"] = time.perf_counter() - started
        if not won:
            _log.info("another process stored this name first", key=plan.key)
            return _Outcome(stored, job=None)
        _log.info("picture stored", key=plan.key, model=job.model, bytes=len(data), **_rounded(timings))
        return _Outcome(stored, job, tuple(warnings), timings)

    async def _draw(self, job: Job) -> Drawing[DrawnPicture]:
        return await asyncio.wrap_future(self._submit(job).result)

    def _fit_prompt(self, plan: Plan) -> Job:
        job, limit = plan.job, plan.facts.text_tokens

        def fit(text: str) -> str:
            return shorten_too_long_text(text, limit, lambda t: self._count_tokens(job.model, t))

        negative = fit(job.negative_prompt) if job.negative_prompt else job.negative_prompt
        return replace(job, prompt=fit(job.prompt), negative_prompt=negative)

    def _encode(self, plan: Plan, job: Job, pixels: Pixels) -> bytes:
        sized = to_size(pixels, plan.order.width, plan.order.height, resample=plan.canvas.resampled)
        inside: Mapping[str, object] | None
        match self._options.embed_metadata:
            case "full":
                inside = {
                    **job_facts(job),
                    "width": plan.order.width,
                    "height": plan.order.height,
                    "digest": plan.content,
                }
            case "digest":
                inside = {"digest": plan.content}
            case _:
                inside = None
        return encode(sized, plan.file_format, plan.quality, inside)

    def _store(self, plan: Plan, job: Job, data: bytes) -> tuple[Stored, bool]:
        content_type, record = plan.file_format.content_type, _record(plan, job)
        if plan.order.overwrite:
            return self._bucket.overwrite(plan.key, data, content_type, record), True
        return self._bucket.create(plan.key, data, content_type, record)


def _record(plan: Plan, job: Job) -> dict[str, str]:
    """What the object's metadata keeps: short and ASCII, since S3 allows 2 KB of it."""
    return {
        "digest": plan.content,
        "order": plan.asked,
        "task": job.task,
        "model": job.model,
        "revision": job.revision,
        "seed": str(job.seed),
        "width": str(plan.order.width),
        "height": str(plan.order.height),
        "steps": str(job.num_inference_steps),
        "guidance": repr(float(job.guidance_scale)),
        "scheduler": job.scheduler,
    }


def _receipt(plan: Plan, job: Job, outcome: _Outcome, *, coalesced: bool) -> Receipt:
    return Receipt(
        key=plan.key,
        cached=False,
        coalesced=coalesced,
        task=job.task,
        model=job.model,
        seed=job.seed,
        width=plan.order.width,
        height=plan.order.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        scheduler=job.scheduler,
        prompt_used=job.prompt if job.prompt != plan.order.prompt else None,
        warnings=outcome.warnings,
        timings=_rounded(outcome.timings or {}),
    )


def _receipt_from_record(plan: Plan, stored: Stored) -> Receipt:
    """The receipt for an object that was there: what its record tells, and whether it is what was asked for."""
    record = stored.record
    random = plan.order.seed == "random"
    same = record.get("order") == plan.asked if random else record.get("digest") == plan.content
    warnings: tuple[Warned, ...] = plan.warnings
    if not same:
        known = "was made from another order" if "digest" in record else "has no record of how it was made"
        warnings = (Warned("different-order", f"The picture stored under this name {known}."),)

    def number(name: str) -> int | None:
        return int(record[name]) if name in record else None

    return Receipt(
        key=stored.key,
        cached=True,
        coalesced=False,
        task=record.get("task", plan.job.task),
        model=record.get("model"),
        seed=number("seed"),
        width=number("width"),
        height=number("height"),
        num_inference_steps=number("steps"),
        guidance_scale=float(record["guidance"]) if "guidance" in record else None,
        scheduler=record.get("scheduler"),
        warnings=warnings,
    )


def _rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(seconds, 4) for stage, seconds in timings.items()}
