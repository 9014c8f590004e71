"""What a model draws: pixels and a pure, frozen request with its digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.types.requests import Task


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
