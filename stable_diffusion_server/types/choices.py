"""Choices of a request: its task and prompt syntax, and how images are fitted, filled and extended."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


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
