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
