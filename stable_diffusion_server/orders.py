"""The nouns that travel: Order down to Job, Receipt back up. Frozen values and their digests; no I/O, no policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Literal

from stable_diffusion_server.errors import InvalidInput

SEED_MAX = 2**32 - 1

Seed = int | Literal["random"] | None


class Task(StrEnum):
    """What is asked for. Tasks differ in how a job is prepared, never in the path it takes."""

    TEXT_TO_IMAGE = "text_to_image"


class Format(StrEnum):
    """File formats a picture can be stored in."""

    WEBP = "webp"
    PNG = "png"
    JPEG = "jpeg"

    @property
    def content_type(self) -> str:
        """The media type of a file of this format."""
        return f"image/{self.value}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds a caller must keep, from the settings. Sides in pixels, `timeout` in seconds; both ends included."""

    min_side: int = 64
    max_side: int = 2048
    max_steps: int = 100
    max_guidance: float = 20.0
    max_prompt_characters: int = 4000
    max_timeout: float = 600.0

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Name of each numeric parameter → (smallest, largest) value taken."""
        return {
            "width": (self.min_side, self.max_side),
            "height": (self.min_side, self.max_side),
            "num_inference_steps": (1, self.max_steps),
            "guidance_scale": (0.0, self.max_guidance),
            "seed": (0, SEED_MAX),
            "quality": (1, 100),
            "timeout": (0.001, self.max_timeout),
        }

    def check(self, order: Order) -> None:
        """Raise `InvalidInput` naming every parameter of `order` that is out of its bounds."""
        faults = []
        for name, (low, high) in self.bounds().items():
            value = getattr(order, name)
            # Written so that NaN, which compares false with everything, is refused.
            if isinstance(value, int | float) and not low <= value <= high:
                faults.append((name, f"{name} must be between {low:g} and {high:g}."))
        longest = self.max_prompt_characters
        for name, text in (("prompt", order.prompt), ("negative_prompt", order.negative_prompt or "")):
            if len(text) > longest:
                faults.append((name, f"{name} must not be longer than {longest} characters."))
        if faults:
            raise InvalidInput.of(faults)


@dataclass(frozen=True, slots=True)
class Order:
    """What the caller asked, as asked. `None` means "you decide"; `width` and `height` in pixels."""

    task: Task
    prompt: str
    width: int
    height: int
    save_path: str | None = None
    model: str | None = None
    negative_prompt: str | None = None
    seed: Seed = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    format: Format | None = None
    quality: int | None = None
    overwrite: bool = False
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What will be drawn, with nothing left to decide: running it twice draws the same picture.

    `width` and `height` are those of the canvas the model draws on, in pixels, and fit the model's grid.
    """

    task: Task
    model: str
    revision: str
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str

    @property
    def shape(self) -> tuple[str, int, int]:
        """What must be equal for two jobs to share a forward pass, as far as it is known before preparing."""
        return (self.model, self.height, self.width)


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the caller should know about a request that succeeded: a code for programs, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in the bucket. `etag` has no quotes; `size` in bytes; `record` says how it was made, ASCII only.

    `waiting`: finished and kept here, and not yet in the bucket.
    """

    key: str
    size: int
    etag: str
    content_type: str
    record: Mapping[str, str]
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to an order: where the picture is and what was really done. `timings` in seconds by stage."""

    key: str
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
    prompt_used: str | None = None
    warnings: tuple[Warned, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


class EventKind(StrEnum):
    """Moments in the life of a job on the device."""

    QUEUED = "queued"
    STARTED = "started"
    STEP = "step"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Event:
    """One moment in a job's life. `step` counts finished steps out of `steps`; `seconds` since it was queued."""

    kind: EventKind
    job_id: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0


def digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a mapping in canonical JSON (sorted keys, no spaces), as 64 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def picture_digest(job: Job) -> str:
    """Identity of what is drawn: equal jobs are equal pictures. Knows nothing of format, quality or name."""
    return digest(asdict(job))
