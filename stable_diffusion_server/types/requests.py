"""What the model draws (DiffusionRequest) with its digest, the images that a request came with, and its caller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.types.choices import (
    ExtraValue,
    ImageInput,
    LatentResize,
    Task,
    Tiling,
)
from stable_diffusion_server.types.guidance import ControlKind, ControlMode, ControlUnit, ImagePrompt

# Fields that few requests have.
_RARE = (
    "references extra weighted clip_skip sampling prompt_2 tiling soft embeddings lora_parts controls image_prompts "
    "keeps_latents latents"
).split()
# Schedulers of second order: two forward passes a step.
_TWO_PASSES = frozenset({"heun", "kdpm2", "kdpm2_a", "dpm_sde", "dpm_2s_a", "flow_heun"})
# Ends with a space, which no key name contains.
_ANONYMOUS = "anonymous "


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
class LatentArray:
    """Finished latents in the VAE's scale (float32, channels × h × w), and how they are enlarged.

    Equality, hash and `digest` depend on shape, content and `resize`.
    """

    values: NDArray[np.float32] = field(compare=False, repr=False)
    resize: LatentResize
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """Compute the SHA-256 of shape, way of enlarging, and content."""
        content = hashlib.sha256(repr((self.values.shape, self.resize.value)).encode())
        content.update(np.ascontiguousarray(self.values).data)
        object.__setattr__(self, "digest", content.hexdigest())


@dataclass(frozen=True, slots=True)
class ControlImage:
    """A control image of the canvas size, and how a network follows it.

    Attributes:
        network: Name of the network.
        revision: SHA-256 of its weights, 16 digits or more.
        kind: What the image shows.
        image: The control image, ready-made.
        mask: Where the network is followed, levels of 0..255; everywhere without one.
        weight: Factor of its residuals.
        start: Share of the steps before it takes effect.
        end: Share of the steps after which it has none.
        mode: Whether prompt or control image counts more.
    """

    network: str
    revision: str
    kind: ControlKind
    image: ImageArray
    mask: ImageArray | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: ControlMode = ControlMode.BALANCED


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image that is read as a prompt is, of any size, by the adapter `name` with the SHA-256 `revision`."""

    name: str
    revision: str
    image: ImageArray
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, slots=True)
class DiffusionRequest:
    """A complete request to a model; running it twice gives the same image.

    Attributes:
        width: Width of the canvas in pixels, a multiple of 64.
        height: Height of the canvas in pixels, a multiple of 64.
        image: Input image, of the canvas size.
        mask: Inpainting mask, of the canvas size.
        control: Edge map for ControlNet, of the canvas size.
        references: Images that an edit by instruction looks at, each of its own size, in the caller's order.
        extra: Parameters that only some models have, by name.
        weighted: Whether the prompts have AUTOMATIC1111's syntax, and up to `MOST_CHUNKS` chunks of 75 tokens.
        clip_skip: Last layers of CLIP that are left out, more than usual; `None` for the model's own.
        prompt_2: What the second text encoder reads in place of `prompt`.
        strength: Share of the denoising steps applied to the input image, 0..1.
        loras: Name and weight of each LoRA.
        lora_parts: Weights of LoRAs by parts of the model, by name, as `read_lora_parts` reads them.
        alone: Whether the request must not share forward passes, so that it can be reproduced bit for bit.
        lora_digests: SHA-256 of each LoRA's file; if empty, the current content of the files is used.
        sampling: Options of the sampler that are not its defaults, by name, sorted.
        tiling: Borders that meet when the image is repeated.
        soft: Whether the mask's levels say in which share of the steps a pixel is repainted; otherwise it is binary.
        embeddings: Name and digest of each textual inversion embedding that a prompt names.
        controls: Control images with their networks, beside `control`.
        image_prompts: Images that are read as a prompt is, with what reads them.
        keeps_latents: Whether the result is the final latents, which are not decoded.
        latents: Latents that are enlarged to the canvas and changed in place of `image`.
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
    lora_parts: tuple[tuple[str, str], ...] = ()
    alone: bool = False
    lora_digests: tuple[str, ...] = ()
    references: tuple[ImageArray, ...] = ()
    extra: tuple[tuple[str, ExtraValue], ...] = ()
    weighted: bool = False
    clip_skip: int | None = None
    sampling: tuple[tuple[str, ExtraValue], ...] = ()
    prompt_2: str | None = None
    tiling: Tiling | None = None
    soft: bool = False
    embeddings: tuple[tuple[str, str], ...] = ()
    controls: tuple[ControlImage, ...] = ()
    image_prompts: tuple[PromptImage, ...] = ()
    keeps_latents: bool = False
    latents: LatentArray | None = None

    @property
    def starts_from_image(self) -> bool:
        """Whether an image or its latents are changed by `strength`."""
        return self.image is not None or self.latents is not None

    @property
    def passes_per_step(self) -> int:
        """Forward passes of one step: 2 for schedulers of second order, whose last step takes one."""
        return 2 if self.scheduler in _TWO_PASSES else 1

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be equal for two requests to share a forward pass, as far as known before `prepare`."""
        references = tuple(image.pixels.shape for image in self.references)
        return (self.model, self.height, self.width, references, *((self.tiling,) if self.tiling else ()))


def digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a mapping as canonical JSON (sorted keys, no spaces), in 64 hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def written(value: object) -> object:
    """A field of a request as a JSON value: images by their digests, values within values by their fields."""
    if isinstance(value, ImageArray | LatentArray):
        return value.digest
    if isinstance(value, ControlImage | PromptImage):
        return {part.name: written(getattr(value, part.name)) for part in fields(value)}
    return [written(part) for part in value] if isinstance(value, tuple) else value


def image_digest(request: DiffusionRequest) -> str:
    """Digest of a request, which identifies the pixels it gives; file format, quality and key are not part of it."""
    return digest(diffusion_request_fields(request))


def diffusion_request_fields(request: DiffusionRequest) -> dict[str, object]:
    """The fields of a request as JSON values; images are replaced by digests, `_RARE` fields left out without one."""
    values = {part.name: getattr(request, part.name) for part in fields(request)}
    values["references"] = [image.digest for image in request.references]
    return {
        name: written(value)
        for name, value in values.items()
        if name not in _RARE or not (value is None or value is False or value in ((), []))
    }


class Format(StrEnum):
    """File formats that images are stored in."""

    WEBP = "webp"
    PNG = "png"
    JPEG = "jpeg"

    @property
    def content_type(self) -> str:
        """The media type of a file of this format."""
        return f"image/{self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputImages:
    """The images that a request came with, each the bytes of a file or a URL.

    Attributes:
        image: Input image.
        mask: What of it is repainted.
        references: Images that an edit by instruction looks at, in order.
        controls: Units that guide the result by images of their own or the input image.
        image_prompts: Images that are read as a prompt is.
    """

    image: ImageInput | None = None
    mask: ImageInput | None = None
    references: tuple[ImageInput, ...] = ()
    controls: tuple[ControlUnit, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()

    @property
    def sources(self) -> tuple[ImageInput, ...]:
        """All of them; each has a `parameter` of its own."""
        guiding = (source for unit in self.controls for source in (unit.image, unit.mask))
        prompts = (prompt.image for prompt in self.image_prompts)
        found = (self.image, self.mask, *self.references, *guiding, *prompts)
        return tuple(source for source in found if source is not None)


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request.

    Attributes:
        name: Name of the API key; empty if no key is required.
        prefix: Object keys that the caller may write, delete and list start with this; empty for all.
        admin: Whether the API key may read and change what belongs to others.
        anonymous: Whether this is a client without a key under ALLOW_ANONYMOUS.
        address: The client's IPv4 address, or its IPv6 /64 network.
        models: Names of the models that the API key may use; empty for all.
    """

    name: str = ""
    prefix: str = ""
    admin: bool = False
    anonymous: bool = False
    address: str = ""
    models: tuple[str, ...] = ()

    @property
    def uses_all_models(self) -> bool:
        """Whether the caller may use every model."""
        return not self.models or self.has_full_access

    @property
    def has_full_access(self) -> bool:
        """Whether the caller may read and change everything: an admin key, or the operator of a local server."""
        return self.admin or not (self.name or self.anonymous)

    def may_access_jobs_of(self, owner: Caller) -> bool:
        """Whether the caller may see and cancel those jobs of `owner` whose ids it knows.

        Anyone who knows the id may access an anonymous client's job, because such clients have no other credential.
        """
        return self.has_full_access or owner.anonymous or owner.owner == self.owner

    @property
    def share(self) -> str:
        """Identifies the caller where capacity is shared fairly: by API key, or by address without one."""
        return f"key {self.name}" if self.name else f"address {self.address}"

    @property
    def owner(self) -> str:
        """Identifies the owner of jobs, idempotency keys and options: the key name, or an anonymous client's address.

        It is empty for the operator, and no key name equals an anonymous client's owner string.
        """
        return f"{_ANONYMOUS}{self.address}" if self.anonymous else self.name

    @classmethod
    def from_owner(cls, owner: str, prefix: str = "") -> Caller:
        """The caller with this stored `owner`; `admin` is false, since it depends on the current keys."""
        if owner.startswith(_ANONYMOUS):
            return cls(anonymous=True, address=owner.removeprefix(_ANONYMOUS))
        return cls(owner, prefix)
