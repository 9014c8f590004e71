"""Results of a request: the stored object, warnings and the result document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """A warning about a request that succeeded: a code for programs and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in the bucket.

    Attributes:
        key: Object key.
        size: Size in bytes.
        etag: ETag without quotes.
        content_type: Media type.
        record: Generation parameters stored with the object, as ASCII strings.
        waiting: Whether the object is still in the local spool and not yet in the bucket.
    """

    key: str
    size: int
    etag: str
    content_type: str
    record: Mapping[str, str]
    waiting: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the object is not empty and has the number of bytes that its record says."""
        return self.size > 0 and self.record.get("bytes", str(self.size)) == str(self.size)


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The result of a request: the parameters that were used, and where the image is stored.

    Attributes:
        stored: Whether the image is in the bucket; false while it is only in the local spool.
        cached: Whether the image existed before the request.
        coalesced: Whether an identical concurrent request generated the image.
        batched: Whether the request shared forward passes; `None` if unknown.
        prompt_used: The prompt after truncation, if it was truncated.
        timings: Seconds per stage.
    """

    key: str
    stored: bool
    cached: bool
    coalesced: bool
    task: str
    model: str | None
    seed: int | None
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    scheduler: str | None
    batched: bool | None = None
    prompt_used: str | None = None
    warnings: tuple[RequestWarning, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
