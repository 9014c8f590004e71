"""What requests are made of: task, prompt syntax, seed, LoRAs, input images, and how those are fitted and extended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

SEED_MAX = 2**64 - 1
# The noise depends on the lower 32 bits of a seed, as that of torch's CPU generator does.
NOISE_SEEDS = 2**32
LORA_WEIGHT_MAX = 8.0
# A LoRA name: the stem of its file, also with folders before it, at most 100 characters. Texts name several with commas
# and weights with colons.
_IN_NAME = r'[^,:<>"\\\x00-\x1f\x7f'
LORA_NAME_PATTERN = rf"(?![./])(?!.*/[./]){_IN_NAME}\s](?:{_IN_NAME}]{{0,98}}{_IN_NAME}\s])?"
Seed = int | Literal["random"] | None
ExtraValue = bool | int | float | str


class Task(StrEnum):
    """The kind of generation. Tasks differ in how a request is prepared; all later stages are the same."""

    TEXT_TO_IMAGE = "text_to_image"
    IMAGE_TO_IMAGE = "image_to_image"
    INPAINT = "inpaint"
    EDIT = "edit"  # by instruction, with reference images
    UPSCALE = "upscale"  # by an upscaler, without a model


class PromptSyntax(StrEnum):
    """How a prompt is written: with AUTOMATIC1111's or compel's weights, or as plain text.

    `(red:1.3)` weighs a word in AUTOMATIC1111's, `(red)1.3` in compel's.
    """

    A1111 = "a1111"
    COMPEL = "compel"
    PLAIN = "plain"


class Fit(StrEnum):
    """How an input image is brought to a size of another aspect ratio."""

    STRETCH = "stretch"
    CROP = "crop"
    PAD = "pad"


class LatentResize(StrEnum):
    """How latents are enlarged, by interpolation."""

    BILINEAR = "latent"
    ANTIALIASED = "latent-antialiased"
    BICUBIC = "latent-bicubic"
    BICUBIC_ANTIALIASED = "latent-bicubic-antialiased"
    NEAREST = "latent-nearest"
    NEAREST_EXACT = "latent-nearest-exact"


class Tiling(StrEnum):
    """Borders of an image that meet when it is repeated: left and right, top and bottom, or both pairs."""

    X = "x"
    Y = "y"
    BOTH = "both"

    @property
    def wraps_x(self) -> bool:
        """Whether the left border meets the right one."""
        return self is not Tiling.Y

    @property
    def wraps_y(self) -> bool:
        """Whether the upper border meets the lower one."""
        return self is not Tiling.X


class MaskMode(StrEnum):
    """How grey parts of a mask are read: hard, they blend old and new; soft, they say how much is changed."""

    HARD = "hard"
    SOFT = "soft"


class Fill(StrEnum):
    """What replaces the masked part of an image before it is repainted."""

    ORIGINAL = "original"
    SURROUNDINGS = "surroundings"
    NOISE = "noise"
    GREY = "grey"


class Extension(NamedTuple):
    """How far an image is extended on each side, in pixels; only what is new is repainted.

    Over `overlap` pixels of the image next to a new side, the new picture fades into the old one.
    """

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    overlap: int = 0

    @property
    def has_sides(self) -> bool:
        """Whether any side is extended."""
        return any((self.left, self.right, self.top, self.bottom))


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
