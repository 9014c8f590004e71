"""A generation service over a fake denoiser, and the requests that tests give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fakes import FakeDenoiser, until

from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.generation.limits import RequestLimits
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.imaging.sandbox.pool import DecoderPool
from stable_diffusion_server.net.image_fetcher import FetchLimits, ImageFetcher
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.types import GenerationRequest, Task

OPTIONS = GenerationOptions(RequestLimits(), "sdxl", "static/uploads")


def order(prompt: str = "a red square", **more: Any) -> GenerationRequest:
    return GenerationRequest(Task.TEXT_TO_IMAGE, prompt, **{"width": 64, "height": 64, **more})


class ServiceHarness:
    """A service with its dependencies, and access to the fake model's calls."""

    def __init__(self, folder: Path, painter: FakeDenoiser) -> None:
        self.painter = painter
        self.bucket = LocalBucket(folder)
        self.bucket.open()
        self.engine: Engine[Any] = Engine(lambda: painter, queue_limit=64, max_batch=4)
        self.engine.start()
        until(lambda: self.engine.state is EngineState.READY)
        self.fetcher = ImageFetcher(FetchLimits(max_bytes=1_000_000))
        self.decoder = DecoderPool(max_bytes=1_000_000, max_pixels=1_000_000, max_side=2048)
        self.service = self.another_process()

    def another_process(self) -> GenerationService:
        """A second service over the same folder, like another server process."""
        return GenerationService(
            self.bucket,
            self.engine,
            self.painter.count_tokens,
            OPTIONS,
            fetch=self.fetcher.fetch,
            decode=self.decoder.decode,
        )

    @property
    def drawn(self) -> int:
        return len(self.painter.finished)
