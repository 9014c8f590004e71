"""Builds what fulfils orders: the service over what draws, stores, fetches and decodes."""

from __future__ import annotations

from typing import Any

from stable_diffusion_server.app.models import ModelState
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.generation import GenerationOptions, GenerationService
from stable_diffusion_server.imaging import DecoderPool
from stable_diffusion_server.net import ImageFetcher
from stable_diffusion_server.observability import Tracing, UsageMetrics
from stable_diffusion_server.settings import Settings


def build_service(
    settings: Settings,
    engine: Engine[Any, Any],
    loaded: ModelState,
    options: GenerationOptions,
    stores: StorageStack,
    readers: tuple[ImageFetcher, DecoderPool],
    account: UsageMetrics,
    tracing: Tracing,
) -> GenerationService:
    """The service, nothing opened or started."""
    fetcher, decoder = readers
    return GenerationService(
        stores.bucket,
        engine,
        loaded.count_tokens,
        options,
        account,
        fetch=fetcher.fetch,
        decode=decoder.decode,
        known=stores.known,
        record=stores.history.record,
        tracing=tracing,
        log_prompts=settings.log_prompts,
    )
