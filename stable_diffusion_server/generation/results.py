"""What is told of a picture: the receipt of one that was drawn or found. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from stable_diffusion_server.generation.layout import ImageLayout, resampling_warnings
from stable_diffusion_server.generation.provenance import RECORDED_WARNINGS
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.types import GenerationResult, RequestWarning, StoredObject

# The largest number below which JSON's readers tell whole ones apart.
_WHOLE_MAX = 2**53
_STORED_LATER = RequestWarning(
    "stored-later", "The storage does not answer; the picture is kept here and brought there later."
)


def result_of_generated(
    plan: ResolvedRequest,
    stored: StoredObject,
    scene: ImageLayout,
    judged: CheckedImage[DecodedPixels],
    warnings: tuple[RequestWarning, ...],
    timings: Mapping[str, float],
    *,
    coalesced: bool,
) -> GenerationResult:
    """The receipt for a picture that was drawn; `warnings` are those of the drawing."""
    job = judged.request
    return GenerationResult(
        key=plan.key,
        stored=not stored.waiting,
        cached=False,
        coalesced=coalesced,
        task=job.task,
        model=job.model,
        seed=job.seed,
        width=scene.width,
        height=scene.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        scheduler=job.scheduler,
        batched=judged.batched,
        prompt_used=job.prompt if job.prompt != plan.request.prompt else None,
        warnings=(*plan.parameters.warnings, *warnings, *_delay_of(stored)),
        timings=rounded(timings),
    )


def result_of_stored(plan: ResolvedRequest, stored: StoredObject) -> GenerationResult:
    """The receipt for an object that was there: what its record tells, and whether it is what was asked for."""
    record = stored.record
    width, height = _whole(record, "width"), _whole(record, "height")
    if plan.matches(record):
        sized = resampling_warnings(plan.parameters.spec, width, height) if width and height else ()
        codes = record.get("warned", "").split(",")
        retold = tuple(RequestWarning(code, RECORDED_WARNINGS[code]) for code in codes if code in RECORDED_WARNINGS)
        warnings = (*plan.parameters.warnings, *sized, *retold)
    else:
        known = "was made from another order" if "digest" in record else "has no record of how it was made"
        warnings = (RequestWarning("different-order", f"The picture stored under this name {known}."),)
    return GenerationResult(
        key=stored.key,
        stored=not stored.waiting,
        cached=True,
        coalesced=False,
        task=record.get("task", plan.request.task),
        model=record.get("model"),
        seed=_whole(record, "seed"),
        width=width,
        height=height,
        num_inference_steps=_whole(record, "steps"),
        guidance_scale=_number(record, "guidance"),
        scheduler=record.get("scheduler"),
        batched=record["batched"] == "1" if "batched" in record else None,
        warnings=(*warnings, *_delay_of(stored)),
    )


def result_for_other_caller(plan: ResolvedRequest, receipt: GenerationResult, seconds: float) -> GenerationResult:
    """The receipt of a picture that was there already, for a caller who may not know whose it is or of what order.

    A name the server made is that of an equal order, so it is told as if it was drawn now. One the caller gave tells
    the same whether or not the other order was equal: else prompts could be guessed.
    """
    if plan.request.save_path is None or plan.request.named_by_content:
        stages = dict.fromkeys(("queue", "prepare", "denoise", "decode", "encode", "store"), 0.0)
        return replace(receipt, cached=False, coalesced=False, timings=rounded({**stages, "total": seconds}))
    taken = RequestWarning(
        "different-order", "Another caller has taken this name; it may hold the picture of another order."
    )
    return GenerationResult(
        key=receipt.key,
        stored=receipt.stored,
        cached=False,
        coalesced=False,
        task=plan.request.task,
        model=None,
        seed=None,
        width=receipt.width,
        height=receipt.height,
        num_inference_steps=None,
        guidance_scale=None,
        scheduler=None,
        warnings=(taken,),
    )


def _number(record: Mapping[str, str], name: str) -> float | None:
    """A number of a record, `None` where there is none: anyone may have put the object there."""
    try:
        value = float(record[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _whole(record: Mapping[str, str], name: str) -> int | None:
    value = _number(record, name)
    return int(value) if value is not None and 0 <= value <= _WHOLE_MAX else None


def _delay_of(stored: StoredObject) -> tuple[RequestWarning, ...]:
    return (_STORED_LATER,) if stored.waiting else ()


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds to a tenth of a millisecond."""
    return {stage: round(seconds, 4) for stage, seconds in timings.items()}
