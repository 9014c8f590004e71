"""The nouns that travel: Order down to Job, Receipt back up. Frozen values and their digests; no I/O, no policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server import caller

SEED_MAX = 2**32 - 1
LORA_WEIGHT_MAX = 2.0

Caller = caller.Caller
Seed = int | Literal["random"] | None


class Task(StrEnum):
    """What is asked for. Tasks differ in how a job is prepared, never in the path it takes."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"


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
class ImageInput:
    """A picture a caller gave: a file's bytes, or the URL they are at. `parameter` is what it came by.

    Of a mask, `transparency` tells that its transparent parts are those to repaint, and not its white ones, and
    `inverted` that it is all the rest.
    """

    parameter: str
    url: str | None = None
    data: bytes | None = field(default=None, repr=False)
    transparency: bool = False
    inverted: bool = False


class Fit(StrEnum):
    """How a picture is brought to a size of another aspect ratio."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


class Fill(StrEnum):
    """What a masked part holds before it is drawn anew."""

    ORIGINAL = "original"
    SURROUNDINGS = "surroundings"
    NOISE = "noise"
    GREY = "grey"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the caller asked, as asked. `None` means "you decide"; `width` and `height` in pixels.

    Without a size the picture has that of `image`; with one the image is brought to it by `fit`. `variation` counts
    further pictures of one order: its seed is that much further. With `only_masked` the part around the mask is cut
    out with so many pixels of margin, drawn at the asked size and put back; `fill` is what the mask hides. `feather`,
    in pixels, softens the mask's rim inwards. With `named_by_content` the order's digest goes before the file name, so
    that no two orders share one. `folder`, with a slash at its end, is where a picture without a `save_path` is stored.
    `alone`: it is to share no forward pass with others, so that it can be drawn again bit for bit. `named_for` is whose
    a name made from the content is.
    """

    task: Task
    prompt: str
    width: int | None = None
    height: int | None = None
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
    image: ImageInput | None = None
    mask: ImageInput | None = None
    strength: float | None = None
    feather: int = 0
    canny: bool | None = False
    canny_low: int = 100
    canny_high: int = 200
    control_scale: float | None = None
    refine: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    named_by_content: bool = False
    webhook_url: str | None = None
    folder: str = ""
    variation: int = 0
    fit: Fit = Fit.CROP
    fill: Fill = Fill.ORIGINAL
    only_masked: int | None = None
    alone: bool = False
    named_for: str = ""

    @property
    def sources(self) -> tuple[ImageInput, ...]:
        """The pictures it comes with."""
        return tuple(source for source in (self.image, self.mask) if source is not None)


@dataclass(frozen=True, slots=True)
class ImageArray:
    """Pixels that travel in a job: uint8, height × width × 3, or height × width for a mask (255 = repaint).

    Compared, hashed and digested by content.
    """

    pixels: NDArray[np.uint8] = field(compare=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Take the content's SHA-256, the shape included."""
        content = hashlib.sha256(repr(self.pixels.shape).encode())
        content.update(np.ascontiguousarray(self.pixels).data)
        object.__setattr__(self, "digest", content.hexdigest())


@dataclass(frozen=True, slots=True)
class DiffusionRequest:
    """What will be drawn, with nothing left to decide: running it twice draws the same picture.

    `width` and `height` are those of the canvas the model draws on, in pixels, and fit the model's grid; `image`,
    `mask` and `control` (edges) have that size. `strength` in 0..1 is how much of the image is drawn anew; `alone`: it
    is to share no forward pass. `lora_digests` tell which content is meant under the name of each adapter; without
    them it is what its file holds when the job is drawn.
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
    image: ImageArray | None = None
    mask: ImageArray | None = None
    control: ImageArray | None = None
    strength: float = 1.0
    control_scale: float = 0.5
    refine: bool = False
    loras: tuple[tuple[str, float], ...] = ()
    alone: bool = False
    lora_digests: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be equal for two jobs to share a forward pass, as far as it is known before preparing."""
        return (self.model, self.height, self.width, self.loras, self.lora_digests)


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
    def whole(self) -> bool:
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


class EngineEventKind(StrEnum):
    """Moments in the life of a job on the device."""

    QUEUED = "queued"
    STARTED = "started"
    STEP = "step"
    AGAIN = "again"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """One moment in a job's life. `step` counts finished steps out of `steps`; `seconds` since it was queued.

    `together` jobs shared that step. `cause` is the kind of error a job failed with, or is begun anew for (`AGAIN`).
    The rest is as in `GenerationProgress`.
    """

    kind: EngineEventKind
    job_id: str
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    together: int = 1
    cause: str = ""


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """How far an order is. `position` counts the jobs before it while it waits (0: on the device).

    `eta_seconds` is `None` where unknown; `preview` a small picture, height × width × 3 uint8, or `None`.
    """

    kind: EngineEventKind
    step: int = 0
    steps: int = 0
    position: int = 0
    eta_seconds: float | None = None
    preview: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


def digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a mapping in canonical JSON (sorted keys, no spaces), as 64 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def image_digest(job: DiffusionRequest) -> str:
    """Identity of what is drawn: equal jobs are equal pictures. Knows nothing of format, quality or name."""
    return digest(diffusion_request_fields(job))


def diffusion_request_fields(job: DiffusionRequest) -> dict[str, object]:
    """The job's fields as JSON can hold them, with the digest in the place of each picture."""
    values = {part.name: getattr(job, part.name) for part in fields(job)}
    return {name: value.digest if isinstance(value, ImageArray) else value for name, value in values.items()}
