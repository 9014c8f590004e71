"""The request that a model executes, and digests of requests and pixels."""

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
    """Pixels of an image (uint8, height × width × 3) or a mask (uint8, height × width; 255 is repainted).

    Equality, hash and `digest` depend on shape and content.
    """

    pixels: NDArray[np.uint8] = field(compare=False, repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the SHA-256 of shape and content."""
        content = hashlib.sha256(repr(self.pixels.shape).encode())
        content.update(np.ascontiguousarray(self.pixels).data)
        object.__setattr__(self, "digest", content.hexdigest())


@dataclass(frozen=True, slots=True)
class DiffusionRequest:
    """A complete request to a model; running it twice gives the same image.

    Attributes:
        width: Width of the canvas in pixels, a multiple of 64.
        height: Height of the canvas in pixels, a multiple of 64.
        image: Input image, of the canvas size.
        mask: Inpainting mask, of the canvas size.
        control: Edge map for ControlNet, of the canvas size.
        strength: Share of the denoising steps applied to the input image, 0..1.
        loras: Name and weight of each LoRA.
        alone: Whether the request must not share forward passes, so that it can be reproduced bit for bit.
        lora_digests: SHA-256 of each LoRA's file; if empty, the current content of the files is used.
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
        """What must be equal for two requests to share a forward pass, as far as known before `prepare`."""
        return (self.model, self.height, self.width, self.loras, self.lora_digests)


def digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a mapping as canonical JSON (sorted keys, no spaces), in 64 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def image_digest(request: DiffusionRequest) -> str:
    """Digest of a request, which identifies the pixels it gives; file format, quality and key are not part of it."""
    return digest(diffusion_request_fields(request))


def diffusion_request_fields(request: DiffusionRequest) -> dict[str, object]:
    """The fields of a request as JSON values; images are replaced by their digests."""
    values = {part.name: getattr(request, part.name) for part in fields(request)}
    return {name: value.digest if isinstance(value, ImageArray) else value for name, value in values.items()}
