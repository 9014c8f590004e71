"""Requests: what the caller asks for (GenerationRequest), and what the model draws (DiffusionRequest)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.types.choices import (
    Extension,
    ExtraValue,
    Fill,
    Fit,
    ImageInput,
    MaskMode,
    PromptSyntax,
    Seed,
    Task,
    Tiling,
)

# Fields that few requests have.
_RARE = "references extra weighted clip_skip sampling prompt_2 tiling soft embeddings lora_parts".split()
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


def image_digest(request: DiffusionRequest) -> str:
    """Digest of a request, which identifies the pixels it gives; file format, quality and key are not part of it."""
    return digest(diffusion_request_fields(request))


def diffusion_request_fields(request: DiffusionRequest) -> dict[str, object]:
    """The fields of a request as JSON values; images are replaced by digests, `_RARE` fields left out without one."""
    values = {part.name: getattr(request, part.name) for part in fields(request)}
    values["references"] = [image.digest for image in request.references]
    return {
        name: value.digest if isinstance(value, ImageArray) else value
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


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request as the caller sent it; `None` means that the server chooses.

    Attributes:
        width: Width in pixels; by default that of `image`, or of the model.
        height: Height in pixels, likewise.
        save_path: Object key to store the image under; by default it is derived from the request.
        overwrite: Whether to generate and store even if the object exists.
        timeout: Seconds until the request fails with `DeadlineExceeded`.
        strength: Share of the denoising steps applied to the input image, 0..1.
        feather: Width in pixels over which the edge of the mask is softened inwards.
        canny: Whether Canny edges of the input image guide the result, with the two thresholds.
        loras: Name and weight of each LoRA.
        lora_parts: Weights of LoRAs by parts of the model, by name, as `read_lora_parts` reads them.
        named_by_content: Whether the request's digest is put before the file name, which makes it unique.
        webhook_url: URL that is called when the job ends.
        folder: Where an image without `save_path` is stored, with a slash at the end.
        variation: Index of the image in a batch; it is added to the seed.
        fit: How `image` is brought to the requested size.
        fill: What replaces the masked part before it is repainted.
        only_masked: If set, the area around the mask with this margin in pixels is repainted at the requested size.
        mask_mode: How grey parts of the mask are read.
        extend: How far `image` is extended; its new sides are inpainted, beside what `mask` covers.
        alone: Whether the request must not share forward passes, so that it can be reproduced bit for bit.
        named_for: Caller that a derived object key belongs to.
        hires_width: Width in pixels of a second pass over the enlarged image; without one `None`.
        hires_height: Its height in pixels, likewise.
        hires_steps: Its denoising steps; by default as many as in the first pass.
        hires_strength: Share of its denoising steps that is applied, 0..1; by default 0.75.
        allow_empty_prompt: Whether the prompt may be empty.
        at_least_one_step: Whether a `strength` that would leave no step draws one, instead of being refused.
        references: Images that an edit by instruction looks at, in order.
        extra: Parameters that only some models have, by name.
        prompt_syntax: How the prompts are written; by default as the model's users write them.
        clip_skip: Last layers of CLIP that are left out, more than usual; `None` for the model's own.
        sampling: Options of the sampler by name: its `schedule`, `eta` and so on.
        prompt_2: What the second text encoder reads in place of `prompt`.
        styles: Names of the styles that the prompts are put in.
        wildcards: Whether wildcards in the prompts are expanded; by default as the server's settings say.
        expanded: Whether the prompts were changed by styles or wildcards.
        tiling: Borders that meet when the image is repeated.
        upscaler: Name of the upscaler of `Task.UPSCALE`.
        scale: Factor of both sides, in place of `width` and `height`.
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
    lora_parts: tuple[tuple[str, str], ...] = ()
    named_by_content: bool = False
    webhook_url: str | None = None
    folder: str = ""
    variation: int = 0
    fit: Fit = Fit.CROP
    fill: Fill = Fill.ORIGINAL
    only_masked: int | None = None
    mask_mode: MaskMode = MaskMode.HARD
    extend: Extension | None = None
    alone: bool = False
    named_for: str = ""
    hires_width: int | None = None
    hires_height: int | None = None
    hires_steps: int | None = None
    hires_strength: float | None = None
    allow_empty_prompt: bool = False
    at_least_one_step: bool = False
    references: tuple[ImageInput, ...] = ()
    extra: tuple[tuple[str, ExtraValue], ...] = ()
    prompt_syntax: PromptSyntax | None = None
    clip_skip: int | None = None
    sampling: tuple[tuple[str, ExtraValue], ...] = ()
    prompt_2: str | None = None
    styles: tuple[str, ...] = ()
    wildcards: bool | None = None
    expanded: bool = False
    tiling: Tiling | None = None
    upscaler: str | None = None
    scale: float | None = None

    @property
    def sources(self) -> tuple[ImageInput, ...]:
        """The input images of the request."""
        return (*(source for source in (self.image, self.mask) if source is not None), *self.references)


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
