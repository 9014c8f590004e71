"""What a caller asks for: tasks, file formats, input images and the request itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

SEED_MAX = 2**32 - 1
LORA_WEIGHT_MAX = 2.0
# A LoRA name: the stem of its file, without folders, at most 100 characters.
LORA_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"

Seed = int | Literal["random"] | None


class Task(StrEnum):
    """The kind of generation. Tasks differ in how a request is prepared; all later stages are the same."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"


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
class ImageInput:
    """An input image: the bytes of a file, or its URL.

    Attributes:
        parameter: Name of the request parameter that it came in.
        url: URL of the file, or `None`.
        data: Bytes of the file, or `None`.
        transparency: Whether a mask's transparent pixels are repainted instead of its white ones.
        inverted: Whether the mask is inverted.
    """

    parameter: str
    url: str | None = None
    data: bytes | None = field(default=None, repr=False)
    transparency: bool = False
    inverted: bool = False


class Fit(StrEnum):
    """How an input image is brought to a size of another aspect ratio."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


class Fill(StrEnum):
    """What replaces the masked part of an image before it is repainted."""

    ORIGINAL = "original"
    SURROUNDINGS = "surroundings"
    NOISE = "noise"
    GREY = "grey"


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
        named_by_content: Whether the request's digest is put before the file name, which makes it unique.
        webhook_url: URL that is called when the job ends.
        folder: Where an image without `save_path` is stored, with a slash at the end.
        variation: Index of the image in a batch; it is added to the seed.
        fit: How `image` is brought to the requested size.
        fill: What replaces the masked part before it is repainted.
        only_masked: If set, the area around the mask with this margin in pixels is repainted at the requested size.
        alone: Whether the request must not share forward passes, so that it can be reproduced bit for bit.
        named_for: Caller that a derived object key belongs to.
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
        """The input images of the request."""
        return tuple(source for source in (self.image, self.mask) if source is not None)
