"""Builds what fulfils orders: the service over what draws, stores, fetches and decodes."""

from __future__ import annotations

from typing import Any

from stable_diffusion_server.app.models import Loaded
from stable_diffusion_server.app.storage import Stores
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.generation.resolver import Options
from stable_diffusion_server.generation.service import Service
from stable_diffusion_server.imaging.sandbox.pool import Decoder
from stable_diffusion_server.net.image_fetcher import Fetcher
from stable_diffusion_server.observability.interfaces import Account
from stable_diffusion_server.observability.tracing import Tracing
from stable_diffusion_server.settings import Settings


def build_service(
    settings: Settings,
    engine: Engine[Any, Any],
    loaded: Loaded,
    options: Options,
    stores: Stores,
    readers: tuple[Fetcher, Decoder],
    account: Account,
    tracing: Tracing,
) -> Service:
    """The service, nothing opened or started."""
    fetcher, decoder = readers
    return Service(
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
