"""Protocols of the generation service's dependencies: image fetcher, image decoder, engine queue, upscaler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from stable_diffusion_server.engine import Ticket
from stable_diffusion_server.errors import InvalidInput
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


class ChosenUpscaler(NamedTuple):
    """An upscaler by its own name; `identity` is all that decides its pixels."""

    name: str
    identity: str


class ImageUpscaler(Protocol):
    """Enlarges images; its methods block."""

    def factors(self) -> Mapping[str, float]:
        """Return the upscalers by name, with the factor of each."""

    def find(self, name: str, field: str, /) -> ChosenUpscaler:
        """Return the upscaler of a name. Raises `InvalidInput` for `field`."""

    def enlarge(
        self, name: str, pixels: Pixels, width: int, height: int, report: Callable[[int, int], None], /
    ) -> Pixels:
        """Enlarge an image (uint8, height × width × 3), cutting off evenly what exceeds the aspect ratio.

        `report` receives how many tiles are done, of how many; what it raises ends the work.
        """


class _NoUpscaler:
    def factors(self) -> Mapping[str, float]:
        return {}

    def find(self, name: str, field: str, /) -> ChosenUpscaler:
        raise InvalidInput("This server has no upscalers.", field=field)

    def enlarge(
        self, name: str, pixels: Pixels, width: int, height: int, report: Callable[[int, int], None], /
    ) -> Pixels:
        raise InvalidInput("This server has no upscalers.")


NO_UPSCALER: ImageUpscaler = _NoUpscaler()
