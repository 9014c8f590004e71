"""Enlarged images: the upscaler of a request, what is stored of its result, and the answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from stable_diffusion_server.generation.interfaces import ChosenUpscaler
from stable_diffusion_server.generation.output import ComposedImage
from stable_diffusion_server.generation.provenance import Authorship, Ingredient
from stable_diffusion_server.generation.resolved_output import ResolvedOutput
from stable_diffusion_server.generation.results import delay_warnings, rounded, whole_number
from stable_diffusion_server.imaging import DigitalSourceType, Pixels, read_record, xmp_packet
from stable_diffusion_server.storage import IMMUTABLE, HistoryEntry
from stable_diffusion_server.types import Caller, GenerationResult, RequestWarning, StoredObject, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUpscale(ResolvedOutput):
    """A request to enlarge an image, with its upscaler."""

    upscaler: ChosenUpscaler

    @property
    def source(self) -> str:
        """The request parameter of the image."""
        return self.request.image.parameter if self.request.image is not None else "image"


@dataclass(frozen=True, slots=True)
class UpscaleOutcome:
    """The stored object; `size` is `None` if it was stored already."""

    stored: StoredObject
    size: tuple[int, int] | None = None
    data: bytes = b""
    warnings: tuple[RequestWarning, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


def composed_upscale(
    resolved: ResolvedUpscale,
    pixels: Pixels,
    size: tuple[int, int],
    file: bytes,
    caller: Caller,
) -> ComposedImage:
    """Return the image to store, made from `file`. It says how the input was made if that was made here."""
    source_record = read_record(file)
    metadata: dict[str, object] = {
        "task": Task.UPSCALE.value,
        "upscaler": resolved.upscaler.name,
        "revision": resolved.upscaler.identity,
        "width": size[0],
        "height": size[1],
        "digest": resolved.content_digest,
        "sources": {name: known for name, known in resolved.source_digests.items() if known is not None},
        **({} if source_record is None else {"source_record": dict(source_record)}),
    }

    def record(file_bytes: int) -> dict[str, str]:
        return {
            "digest": resolved.content_digest,
            "order": resolved.request_digest,
            "sent": resolved.sent_digest,
            "task": Task.UPSCALE.value,
            "upscaler": resolved.upscaler.name.encode("ascii", "backslashreplace").decode()[:200],
            "width": str(size[0]),
            "height": str(size[1]),
            "file": resolved.file,
            "bytes": str(file_bytes),
            **({IMMUTABLE: "1"} if resolved.request.save_path is None else {}),
        }

    entry = HistoryEntry(
        key=resolved.key,
        digest=resolved.content_digest,
        prompt="",
        model=resolved.upscaler.name,
        task=Task.UPSCALE,
        seed=0,
        width=size[0],
        height=size[1],
        caller=caller.name,
        drawn_at=time.time(),
        record=metadata,
    )
    source_type = None if source_record is None else DigitalSourceType.EDITED
    authorship = Authorship(
        resolved.upscaler.name,
        resolved.upscaler.identity,
        resolved.content_digest,
        source_type,
        (Ingredient(resolved.source, file, parent=True),),
    )
    xmp = "" if source_type is None else xmp_packet(source_type)
    return ComposedImage(lambda: pixels, size, metadata, record, entry, xmp, authorship)


def upscale_warnings(resolved: ResolvedUpscale, pixels: Pixels, size: tuple[int, int]) -> tuple[RequestWarning, ...]:
    """Return a warning if the result is no larger than the input: no upscaler runs then."""
    if size[0] > pixels.shape[1] or size[1] > pixels.shape[0]:
        return ()
    sentence = "The result is no larger than the image, so Lanczos made it."
    return (RequestWarning("not-enlarged", sentence),)


def upscale_result(
    resolved: ResolvedUpscale, outcome: UpscaleOutcome, *, joined: bool, may_know: bool, seconds: float
) -> GenerationResult:
    """Return the result that a caller may see; `may_know`: it may learn what was stored before its request."""
    stored, record, request = outcome.stored, outcome.stored.record, resolved.request
    found, named = outcome.size is None, request.save_path is not None and not request.named_by_content
    size = outcome.size or (whole_number(record, "width"), whole_number(record, "height"))
    name: str | None = resolved.upscaler.name
    warnings = outcome.warnings
    if found and not may_know and named:
        name, sentence = None, "Another caller has taken this name; it may hold the picture of another order."
        warnings = (RequestWarning("different-request", sentence),)
    elif found and not resolved.matches(record):
        name = record.get("upscaler") or record.get("model")
        sentence = "The picture stored under this name was made from another order."
        warnings = (RequestWarning("different-request", sentence),)
    timings = outcome.timings if not found else {} if may_know else {"total": seconds}
    return GenerationResult(
        key=resolved.key,
        stored=not stored.waiting,
        cached=found and may_know,
        coalesced=not found and joined and may_know,
        task=Task.UPSCALE,
        model=name,
        seed=None,
        width=size[0],
        height=size[1],
        num_inference_steps=None,
        guidance_scale=None,
        scheduler=None,
        warnings=(*warnings, *delay_warnings(stored)),
        timings=rounded(timings),
    )
