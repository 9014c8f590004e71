"""Turns pictures into control images for requests: the protocol, and the preprocessors that need no models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stable_diffusion_server.concurrency import FairLimiter
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.imaging import (
    NO_PREPROCESSOR,
    PREPROCESSORS,
    Pixels,
    Preprocessor,
    draw_control,
    find_preprocessor,
)
from stable_diffusion_server.types import digest

# Control images that are drawn at a time without models, each on a thread, so that memory is bounded.
_CONCURRENCY = 2


@dataclass(frozen=True, slots=True)
class ChosenPreprocessor:
    """A preprocessor with the values of its options and the digests of its model files.

    `row` is `None` for a ready-made control image. `identity` is all that decides the pixels.
    """

    row: Preprocessor | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its own name; `none` for a ready-made control image."""
        return NO_PREPROCESSOR if self.row is None else self.row.name

    @property
    def identity(self) -> str:
        """The digest of name, values and files; empty for a ready-made control image."""
        if self.row is None:
            return ""
        return digest({"preprocessor": self.name, "values": dict(self.values), "files": self.files})


class ImagePreprocessor(Protocol):
    """Turns pictures into control images."""

    def usable(self) -> Sequence[Preprocessor]:
        """Return the preprocessors whose model files are there, in the order of the lists. Reads folders."""

    def find(self, name: str, options: Mapping[str, float], field: str, /) -> ChosenPreprocessor:
        """Return the preprocessor of a name or alias with checked options. Reads files; blocks.

        Raises `InvalidInput` for `field`: for an unknown name, options that it does not take, a missing model file.
        """

    async def preprocess(
        self, chosen: ChosenPreprocessor, pixels: Pixels, field: str, /, *, share: str = ...
    ) -> Pixels:
        """Return the control image of a picture (both uint8, height × width × 3).

        Its size follows from `resolution`; `tile_resample` makes it smaller. `share` identifies the caller.
        Raises `InvalidInput` for `field` if it cannot be made, `NotReady` if no process can be started.
        """


class InProcessPreprocessor:
    """The preprocessors that need no models. For one event loop."""

    def __init__(self) -> None:
        self._limiter = FairLimiter(_CONCURRENCY)

    def usable(self) -> Sequence[Preprocessor]:
        """Return the preprocessors that need no files."""
        return [row for row in PREPROCESSORS.values() if row.draw is not None]

    def find(self, name: str, options: Mapping[str, float], field: str, /) -> ChosenPreprocessor:
        """Return the preprocessor of a name or alias with checked options. Raises `InvalidInput` for `field`."""
        if name.strip().lower() in (NO_PREPROCESSOR, ""):
            if options:
                raise InvalidInput("A ready-made control image takes no options.", field=field)
            return ChosenPreprocessor()
        row = find_preprocessor(name, field)
        if row.draw is None:
            needed = " and ".join(need.what for need in row.needs)
            raise InvalidInput(f"{row.name} needs {needed}, which this server does not have.", field=field)
        return ChosenPreprocessor(row, row.values(options, field))

    async def preprocess(self, chosen: ChosenPreprocessor, pixels: Pixels, field: str, /, *, share: str = "") -> Pixels:
        """Return the control image of a picture (both uint8, height × width × 3). Raises `InvalidInput`."""
        if chosen.row is None:
            return pixels
        async with self._limiter.hold(share):
            return await asyncio.to_thread(draw_control, chosen.row, pixels, chosen.values, field)
