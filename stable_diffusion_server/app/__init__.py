"""The composition root: builds every room from the settings, and owns the lifespan. Decides nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI

from stable_diffusion_server import __version__
from stable_diffusion_server.api import handlers, ops, uploads
from stable_diffusion_server.app.doors import add_middleware
from stable_diffusion_server.app.drawing import Loaded, Models, build_engine, build_readers, options_of
from stable_diffusion_server.app.stopping import drained_by_signals
from stable_diffusion_server.app.storage import build_bucket, known_to, open_folders, url_maker
from stable_diffusion_server.engine import Phase
from stable_diffusion_server.observability import configure_logging
from stable_diffusion_server.service import Service
from stable_diffusion_server.settings import Settings

_log = structlog.get_logger(__name__)

STOP_GRACE_SECONDS = 30.0


def create_app(
    settings: Settings,
    load: Callable[[Settings], Models] | None = None,
    announce: Callable[[], object] = lambda: None,
) -> FastAPI:
    """The application over `settings`. Opens nothing and starts nothing; the lifespan does.

    `load` makes what draws, the models of the settings unless told otherwise; `announce` is called when it is done.
    Both run on the engine's thread.
    """
    loaded, faults = Loaded.of(settings), dict[str, str]()

    def missing() -> list[str]:
        """What keeps the server from drawing, in sentences; what was at fault before is looked at again."""
        if faults:
            open_folders(settings, bucket, faults)
        reasons = [*faults.values(), *filter(None, [bucket.fault()])]
        return [*reasons, engine.reason] if engine.phase is not Phase.READY else reasons

    def ready() -> None:
        if not missing():
            announce()

    engine, metrics = build_engine(settings, loaded, load, ready)
    bucket = build_bucket(settings)
    options = options_of(settings, loaded)
    fetcher, decoder = build_readers(settings)
    fetch, decode, known = fetcher.fetch, decoder.decode, known_to(bucket)
    answered, count = metrics.answered, loaded.count_tokens
    service = Service(bucket, engine, count, options, answered, fetch=fetch, decode=decode, known=known)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings.log_level, settings.log_format)
        # Its lines hold query strings, and so prompts; Gate logs requests instead.
        logging.getLogger("uvicorn.access").disabled = True
        await asyncio.to_thread(open_folders, settings, bucket, faults)
        engine.start()
        with drained_by_signals(engine):
            yield
        await asyncio.to_thread(engine.stop, STOP_GRACE_SECONDS)
        service.close()
        fetcher.close()
        await decoder.close()
        await asyncio.to_thread(bucket.close)

    app = FastAPI(
        title="Stable Diffusion Server",
        version=__version__,
        summary="A prompt in, the URL of a stored picture out.",
        lifespan=lifespan,
        redoc_url=None,
    )
    handlers.install(app)
    add_middleware(app, settings)
    app.include_router(uploads.router(service, options.limits, url_maker(settings, bucket)))
    app.include_router(ops.router(missing, metrics.exposition, loaded.told))
    folder = f"{settings.bucket_path.strip('/')}/".lstrip("/")
    app.include_router(ops.files_router(bucket, folder, private=settings.signed_url_seconds > 0))
    return app
