"""Builds results of generation requests: for a new image, a cache hit, or an image of another caller."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cachetools import LRUCache

from stable_diffusion_server.generation.layout import ImageLayout, resampling_warnings
from stable_diffusion_server.generation.limits import parse_int
from stable_diffusion_server.generation.permissions import Ownership
from stable_diffusion_server.generation.provenance import RECORDED_WARNINGS
from stable_diffusion_server.generation.quality import CheckedImage, DecodedPixels
from stable_diffusion_server.generation.resolver import ResolvedRequest
from stable_diffusion_server.pipelines import CHUNK_TOKENS, MOST_CHUNKS
from stable_diffusion_server.types import (
    SEED_MAX,
    Caller,
    DiffusionRequest,
    GenerationRequest,
    GenerationResult,
    RequestWarning,
    StoredObject,
)

# The largest integer that every JSON reader represents exactly.
_MAX_EXACT_INTEGER = 2**53
# Characters of the prompts of a request. Longer ones are not cached: 1,024 times 32,000 emoji would be 0.5 GB.
_LONG = 4000
_STORED_LATER = RequestWarning(
    "stored-later", "The storage does not take the image now; it is kept here and uploaded later."
)


@dataclass(frozen=True, slots=True)
class GenerationOutcome:
    """Outcome of one shared generation task. `layout` and `image` are `None` if the object was already stored.

    `data` is the stored file. `coalesced`: an equal request under another key generated the image.
    """

    stored: StoredObject
    layout: ImageLayout | None = None
    image: CheckedImage[DecodedPixels] | None = None
    data: bytes = b""
    coalesced: bool = False
    warnings: tuple[RequestWarning, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


class ResultCache:
    """Results of cache hits, by key. An entry is valid only for the very objects it was made from. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._entries: LRUCache[str, tuple[ResolvedRequest, StoredObject, GenerationResult]] = LRUCache(size)
        self._lock = threading.Lock()

    def result_of(self, resolved: ResolvedRequest, stored: StoredObject) -> GenerationResult:
        """Return the result for a stored object, from the cache if possible."""
        with self._lock:
            entry = self._entries.get(resolved.key)
            if entry is None or entry[0] is not resolved or entry[1] is not stored:
                entry = self._entries[resolved.key] = (resolved, stored, result_of_stored(resolved, stored))
            return entry[2]


def is_long(request: GenerationRequest) -> bool:
    """Return whether the prompts of a request are too long to be read on the event loop, and to be cached."""
    texts = (request.prompt, request.negative_prompt, request.prompt_2)
    return sum(len(text or "") for text in (*texts, request.hires_prompt, request.hires_negative_prompt)) > _LONG


def result_of_outcome(
    resolved: ResolvedRequest,
    outcome: GenerationOutcome,
    caller: Caller,
    ownership: Ownership,
    *,
    joined: bool,
    seconds: float,
) -> GenerationResult:
    """Return the result that a caller may see; `joined`: it joined the task of an equal request.

    Raises `Forbidden` for a private image of another API key under a name that the request chose.
    """
    may_know = ownership.visible_record(caller, outcome.stored, named=resolved.key_is_known)
    if outcome.layout is None or outcome.image is None:
        result = result_of_stored(resolved, outcome.stored)
        return result if may_know else result_for_other_caller(resolved, result, seconds)
    # The equal request under another key may be of another caller; this caller must not learn about it.
    may_tell = may_know and (joined or ownership.keyed is None or caller.has_full_access)
    return result_of_generated(
        resolved,
        stored=outcome.stored,
        layout=outcome.layout,
        image=outcome.image,
        warnings=outcome.warnings,
        timings=outcome.timings,
        coalesced=(joined or outcome.coalesced) and may_tell,
    )


def result_of_generated(
    resolved: ResolvedRequest,
    *,
    stored: StoredObject,
    layout: ImageLayout,
    image: CheckedImage[DecodedPixels],
    warnings: tuple[RequestWarning, ...],
    timings: Mapping[str, float],
    coalesced: bool,
) -> GenerationResult:
    """Return the result for a newly generated image; `warnings` are those of the generation."""
    request = image.request
    return GenerationResult(
        key=resolved.key,
        stored=not stored.waiting,
        cached=False,
        coalesced=coalesced,
        task=request.task,
        model=request.model,
        seed=request.seed,
        seed_text=seed_text(request.seed),
        width=layout.width,
        height=layout.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
        batched=image.batched,
        prompt_used=request.prompt if request.prompt != resolved.request.prompt or resolved.request.expanded else None,
        warnings=(*resolved.parameters.warnings, *warnings, *delay_warnings(stored)),
        timings=rounded(timings),
    )


def generation_warnings(
    resolved: ResolvedRequest, layout: ImageLayout, request: DiffusionRequest, image: CheckedImage[DecodedPixels]
) -> list[RequestWarning]:
    """Return warnings about a shortened prompt (`request` has the shortened one), decoding, and what was not used."""
    warnings = []
    limit = MOST_CHUNKS * CHUNK_TOKENS if request.weighted else resolved.parameters.spec.text_tokens
    if request.prompt != layout.request.prompt:
        warnings.append(RequestWarning("prompt-shortened", f"{request.model} reads {limit} tokens; see prompt_used."))
    if request.negative_prompt != layout.request.negative_prompt:
        sentence = f"The negative prompt was shortened: {request.model} reads {limit} tokens."
        warnings.append(RequestWarning("prompt-shortened", sentence))
    if request.prompt_2 != layout.request.prompt_2:
        sentence = f"prompt_2 was shortened: {request.model} reads {limit} tokens."
        warnings.append(RequestWarning("prompt-shortened", sentence))
    if image.product.redecoded:
        warnings.append(RequestWarning("redecoded", "The decoder overflowed and ran again in full precision."))
    if image.product.tiled:
        warnings.append(RequestWarning("tiled", RECORDED_WARNINGS["tiled"]))
    warnings += [RequestWarning("not-used", sentence) for sentence in image.product.warnings]
    return warnings


def result_of_stored(resolved: ResolvedRequest, stored: StoredObject) -> GenerationResult:
    """Return the result for a cache hit, from the object's record. Warns if another request made the object."""
    record = stored.record
    width, height = whole_number(record, "width"), whole_number(record, "height")
    seed = parse_int(record.get("seed", ""))
    seed = seed if seed is None or seed <= SEED_MAX else None
    used = None
    if resolved.matches(record):
        used = resolved.parameters.prompt if resolved.request.expanded else None
        resampled = resampling_warnings(resolved.parameters.spec, width, height) if width and height else ()
        codes = record.get("warned", "").split(",")
        recorded = tuple(RequestWarning(code, RECORDED_WARNINGS[code]) for code in codes if code in RECORDED_WARNINGS)
        warnings = (*resolved.parameters.warnings, *resampled, *recorded)
    else:
        difference = "was made from another order" if "digest" in record else "has no record of how it was made"
        warnings = (RequestWarning("different-request", f"The picture stored under this name {difference}."),)
    return GenerationResult(
        key=stored.key,
        stored=not stored.waiting,
        cached=True,
        coalesced=False,
        task=record.get("task", resolved.request.task),
        model=record.get("model"),
        seed=seed,
        seed_text=seed_text(seed),
        width=width,
        height=height,
        num_inference_steps=whole_number(record, "steps"),
        guidance_scale=_float(record, "guidance"),
        scheduler=record.get("scheduler"),
        batched=record["batched"] == "1" if "batched" in record else None,
        prompt_used=used,
        warnings=(*warnings, *delay_warnings(stored)),
    )


def result_for_other_caller(resolved: ResolvedRequest, result: GenerationResult, seconds: float) -> GenerationResult:
    """Return the result for a stored image whose existence the caller must not learn.

    Under a key derived from the request, the result looks like that of a new image. Under a key that the caller chose,
    the result is the same whether or not the requests are equal; otherwise callers could guess prompts.
    """
    if resolved.request.save_path is None or resolved.request.named_by_content:
        stages = dict.fromkeys(("queue", "prepare", "denoise", "decode", "encode", "store"), 0.0)
        return replace(result, cached=False, coalesced=False, timings=rounded({**stages, "total": seconds}))
    taken = RequestWarning(
        "different-request", "Another caller has taken this name; it may hold the picture of another order."
    )
    return GenerationResult(
        key=result.key,
        stored=result.stored,
        cached=False,
        coalesced=False,
        task=resolved.request.task,
        model=None,
        seed=None,
        width=result.width,
        height=result.height,
        num_inference_steps=None,
        guidance_scale=None,
        scheduler=None,
        warnings=(taken,),
    )


def _float(record: Mapping[str, str], name: str) -> float | None:
    """Return a finite number of a record, otherwise `None`: other software may have written the record."""
    try:
        value = float(record[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def whole_number(record: Mapping[str, str], name: str) -> int | None:
    """Return a whole number of a record, otherwise `None`."""
    value = _float(record, name)
    return int(value) if value is not None and 0 <= value <= _MAX_EXACT_INTEGER else None


def delay_warnings(stored: StoredObject) -> tuple[RequestWarning, ...]:
    """Return a warning for an object that waits for the bucket."""
    return (_STORED_LATER,) if stored.waiting else ()


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds rounded to 0.1 ms."""
    return {stage: round(seconds, 4) for stage, seconds in timings.items()}


def seed_text(seed: int | None) -> str | None:
    """Return a seed as text if not every JSON reader represents it exactly as a number."""
    return str(seed) if seed is not None and seed > _MAX_EXACT_INTEGER else None
