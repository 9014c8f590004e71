"""Builds what draws: the engine over the models, the observers of its events, and the bounds of an order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import structlog

from stable_diffusion_server.decoding.pool import Decoder
from stable_diffusion_server.engine import Denoiser, Engine
from stable_diffusion_server.errors import NotReady
from stable_diffusion_server.fetching.fetcher import Bounds, Fetcher
from stable_diffusion_server.fetching.targets import Allowance
from stable_diffusion_server.limits import Limits
from stable_diffusion_server.observability import ConsoleProgress, Heartbeat, Metrics, each
from stable_diffusion_server.resolving import Options
from stable_diffusion_server.settings import Settings

_log = structlog.get_logger(__name__)


class Models(Denoiser[Any, Any], Protocol):
    """What draws, and what counts a prompt's tokens as the model reads them."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Safe from any thread."""


@dataclass(slots=True)
class Loaded:
    """The loaded models, once there are any. Filled by the engine's thread."""

    models: Models | None = None

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Raises `NotReady` until the models are loaded."""
        if self.models is None:
            raise NotReady("The models are loading.", retry_after=5)
        return self.models.count_tokens(model, prompt)


def load_models(settings: Settings) -> Models:
    """The models of the settings, loaded. Takes seconds."""
    # Imported here, on the engine's thread: torch takes seconds, and the port should answer meanwhile.
    from stable_diffusion_server.pipelines import registry

    return registry.load(settings.models_dir, settings.device, settings.cpu_threads)


def build_engine(
    settings: Settings, loaded: Loaded, load: Callable[[Settings], Models], ready: Callable[[], object]
) -> tuple[Engine[Any, Any], Metrics]:
    """The engine and the observers of its events, not started."""

    def load_and_tell() -> Models:
        started = perf_counter()
        loaded.models = load(settings)
        _log.info("models loaded", seconds=round(perf_counter() - started, 1))
        return loaded.models

    metrics = Metrics(lambda: engine.waiting, lambda: engine.running)
    observers = (
        metrics.observe,
        ConsoleProgress().observe,
        Heartbeat(settings.data_dir / "progress.txt").observe,
    )
    engine: Engine[Any, Any] = Engine(
        load_and_tell,
        queue_limit=settings.queue_limit,
        max_batch=settings.max_batch,
        observe=each(observers),
        ready=ready,
    )
    return engine, metrics


def options_of(settings: Settings) -> Options:
    """What an order may ask for, and what is taken where it asks for nothing."""
    limits = Limits(
        min_side=settings.min_side,
        max_side=settings.max_side,
        max_steps=settings.max_steps,
        max_guidance=settings.max_guidance,
        max_prompt_characters=settings.max_prompt_characters,
        max_timeout=settings.max_timeout,
    )
    return Options(
        limits,
        settings.text_to_image_model,
        settings.bucket_path,
        settings.embed_metadata,
        None if settings.bumpy_redraws == "auto" else int(settings.bumpy_redraws),
    )


def build_readers(settings: Settings) -> tuple[Fetcher, Decoder]:
    """What turns URLs into bytes, and bytes into pixels; nothing is started before the first picture."""
    fetcher = Fetcher(
        Bounds(max_bytes=settings.max_image_bytes, total=settings.fetch_timeout),
        [Allowance.parse(entry) for entry in settings.fetch_allow],
    )
    decoder = Decoder(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        max_side=settings.max_image_side,
        processes=settings.decode_processes,
        seconds=settings.decode_timeout,
    )
    return fetcher, decoder
