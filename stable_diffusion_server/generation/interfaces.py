"""Protocols of the generation service's dependencies: image fetcher, image decoder, engine queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from stable_diffusion_server.engine import Ticket
from stable_diffusion_server.generation.quality import DecodedPixels
from stable_diffusion_server.imaging import Pixels
from stable_diffusion_server.types import DiffusionRequest, EngineEvent, GenerationProgress


class FetchImage(Protocol):
    """Downloads an image. `field` is the request parameter with the URL; `share` is the caller, for fair limits."""

    async def __call__(self, url: str, field: str, /, *, share: str = ...) -> bytes:
        """Return the file at a URL."""


class DecodeImage(Protocol):
    """Decodes an image file. With `transparency`, the result is white where the image is transparent."""

    async def __call__(self, data: bytes, field: str, /, *, transparency: bool = ..., share: str = ...) -> Pixels:
        """Return the pixels, uint8, height × width × 3; `share` is the caller, for fair limits."""


class EngineQueue(Protocol):
    """The part of the engine that accepts requests. Its methods raise `NotReady` and `QueueFull`."""

    def check_open(self, owner: str = "", *, background: bool = False) -> None:
        """Raise the error that `submit` would raise now."""

    def submit(
        self,
        job: DiffusionRequest,
        *,
        owner: str,
        background: bool,
        previews: bool,
        watch: Callable[[EngineEvent], None],
        wants_picture: Callable[[], bool],
        label: str,
        exclusive: bool,
    ) -> Ticket[DecodedPixels]:
        """Queue a request. `watch` receives its events, on the engine's threads; `wants_picture` is called there."""

    def load_model(
        self,
        model: str,
        *,
        owner: str,
        background: bool,
        watch: Callable[[EngineEvent], None],
        label: str,
        exclusive: bool,
    ) -> Ticket[DecodedPixels]:
        """Have a model loaded; the ticket is done when it is. Cancelling it ends the load unless others wait for it."""


def ignore(progress: GenerationProgress) -> None:
    """Ignore a progress report."""
