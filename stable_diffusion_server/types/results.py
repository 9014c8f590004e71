"""What comes back: stored objects, warnings and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """Something the caller should know about a request that succeeded: a code for programs, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in the bucket. `etag` has no quotes; `size` in bytes; `record` says how it was made, ASCII only.

    `waiting`: finished and kept here, and not yet in the bucket.
    """

    key: str
    size: int
    etag: str
    content_type: str
    record: Mapping[str, str]
    waiting: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether it can be a picture: not empty, and of as many bytes as its record says were written."""
        return self.size > 0 and self.record.get("bytes", str(self.size)) == str(self.size)


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The answer to an order: where the picture is and what was really done. `timings` in seconds by stage.

    `batched`: it shared forward passes, `None` where that is not known.
    `stored` is false while the picture is kept by this server and not yet in the bucket.
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
