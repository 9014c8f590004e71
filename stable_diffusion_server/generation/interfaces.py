"""What the service is handed in: how bytes come from an address, and pixels from bytes. Types alone."""

from __future__ import annotations

from typing import Protocol

from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import GenerationProgress


class FetchImage(Protocol):
    """From a URL and the parameter it came by to bytes; `share` tells callers apart, who share the capacity."""

    async def __call__(self, url: str, field: str, /, *, share: str = ...) -> bytes:
        """The file."""


class DecodeImage(Protocol):
    """From a file and the parameter it came by to pixels; with `transparency`, white where it is transparent."""

    async def __call__(self, data: bytes, field: str, /, *, transparency: bool = ..., share: str = ...) -> Pixels:
        """The pixels, uint8, height × width × 3; `share` tells callers apart, who share the capacity."""


def ignore(progress: GenerationProgress) -> None:
    """Take no note of how far an order is."""
