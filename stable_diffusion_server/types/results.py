"""Results of a request: progress events, the stored object, warnings and the result document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
        seed_text: The seed as text if it is above 2^53, which not every JSON reader represents exactly.
        prompt_used: The prompt after styles and wildcards were expanded, and after truncation, if that changed it.
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
    seed_text: str | None = None
    warnings: tuple[RequestWarning, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


class EngineEventKind(StrEnum):
    """States and steps of a request in the engine.

    `LOADING`: its model is being loaded; `RESTARTED` begins it again after a failure or preemption.
    """

    QUEUED = "queued"
    LOADING = "loading"
    STARTED = "started"
    STEP = "step"
    RESTARTED = "again"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One event of a request in the engine; the other attributes are those of `GenerationProgress`.

    Attributes:
        seconds: Time since the request was queued.
        batch_size: Number of requests that shared the step.
        picture: What the denoiser decoded from the unfinished request, if its caller wants that, or `None`.
        cause: The kind of error that the request failed with, or that restarted it.
    """

    kind: EngineEventKind
    job_id: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    batch_size: int = 1
    cause: str = ""
    picture: Any = field(default=None, compare=False, repr=False)
    loaded: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """Progress of a request.

    Attributes:
        step: Finished steps, out of `steps`.
        position: Number of requests ahead in the queue; 0 on the device.
        eta_seconds: Estimated seconds until the image is ready, or `None` if unknown.
        preview: Small preview image (uint8, height × width × 3), or `None`.
        picture: Makes the unfinished image (uint8, height × width × 3) for a listener that wants it, or `None`.
        loaded: Loaded share of the request's model, 0..1, while it is being loaded; otherwise `None`.
    """

    kind: EngineEventKind
    step: int = 0
    steps: int = 0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    picture: Callable[[], NDArray[np.uint8]] | None = field(default=None, compare=False, repr=False)
    loaded: float | None = None
