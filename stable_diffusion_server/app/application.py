"""Builds the application: every part from the settings, and its startup, warm-up and shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog
from fastapi import FastAPI

from stable_diffusion_server import __version__
from stable_diffusion_server.api import health_router, install_exception_handlers
from stable_diffusion_server.app.http import add_middleware, add_replay, add_routes
from stable_diffusion_server.app.job_services import build_jobs
from stable_diffusion_server.app.lifecycle import CloseConnectionsMiddleware, Shutdown, drain_on_signal, exit_soon
from stable_diffusion_server.app.metrics import register_metrics
from stable_diffusion_server.app.models import ModelBackend, ModelState, build_engine, build_readers, generation_options
from stable_diffusion_server.app.services import build_service
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.app.ui import key_of_visitor, mount_ui
from stable_diffusion_server.engine import EngineState
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.imaging import DecoderPool
from stable_diffusion_server.jobs import JobManager
from stable_diffusion_server.net import ImageFetcher
from stable_diffusion_server.observability import (
    HEARTBEAT_FILE,
    DeviceRecord,
    LoopHeartbeat,
    Metrics,
    Tracing,
    configure_logging,
)
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.ui import SessionStore

_log = structlog.get_logger(__name__)

_TITLE, _SUMMARY = "Stable Diffusion Server", "A prompt in, the URL of a stored picture out."


def create_app(
    settings: Settings,
    load: Callable[[Settings], ModelBackend] | None = None,
    announce: Callable[[], object] = lambda: None,
    poisoned: Callable[[], object] = exit_soon,
    settle: Callable[[], object] = lambda: None,
) -> FastAPI:
    """The application over `settings`. Opens nothing and starts nothing; the lifespan does.

    `load` makes what draws, the models of the settings unless told otherwise; `announce` is called when it is done, and
    `poisoned` when the device can only be used again by another process: all of them on the engine's thread. `settle`
    is called, on any thread, when much was loaded that stays; see `settling`.
    """
    loaded, faults = ModelState.of(settings), dict[str, str]()

    def missing() -> list[str]:
        """What keeps the server from drawing, in sentences, each once; what was at fault before is looked at again."""
        if faults:
            stores.open(faults)
        found = filter(None, [*faults.values(), stores.bucket.health(), *stalled(), *loaded.missing()])
        reasons = [*dict.fromkeys(found)]
        return [*reasons, loaded.progress() or engine.reason] if engine.state is not EngineState.READY else reasons

    metrics, tracing = Metrics(), Tracing(settings.otel_exporter_otlp_endpoint, __version__)
    record = DeviceRecord(settings.data_dir)
    ready = lambda: missing() or announce()  # noqa: E731  # a word for what follows
    engine = build_engine(settings, loaded, load, metrics, settle, ready, poisoned, record.update)
    stores = StorageStack(settings, metrics)
    options = replace(generation_options(settings, loaded), ownership=stores.ownership)
    fetcher, decoder = readers = build_readers(settings)
    service = build_service(settings, engine, loaded, options, stores, readers, metrics, tracing)
    jobs = build_jobs(settings, service, stores, record)
    shutdown = Shutdown(lambda: engine.running > 0 or jobs.running > 0, settings.shutdown_grace_seconds)
    stalled = partial(_stalled, decoder, jobs)
    register_metrics(metrics, __version__, engine, jobs, stores, loaded, missing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await _open(settings, tracing, stores, faults)
        engine.start()
        await jobs.start()
        async with LoopHeartbeat(settings.data_dir / HEARTBEAT_FILE, stalled):
            soon = asyncio.get_running_loop().call_soon_threadsafe
            with drain_on_signal(shutdown, engine.drain, lambda: soon(jobs.drain), lambda: soon(studio.drain)):
                yield
                grace = shutdown.seconds_left()
                await asyncio.gather(studio.close(), asyncio.to_thread(engine.stop, grace), jobs.stop(grace))
            await _close(service, fetcher, decoder, stores, tracing)

    app = FastAPI(title=_TITLE, version=__version__, summary=_SUMMARY, lifespan=lifespan, docs_url=None, redoc_url=None)
    # For what runs this app in its own way (deploy/): how much work there is, and whether it can be done.
    app.state.engine, app.state.jobs = engine, jobs
    install_exception_handlers(app)
    add_middleware(app, settings, metrics, tracing, key_of_visitor(guests := SessionStore()))
    app.add_middleware(CloseConnectionsMiddleware, shutdown=shutdown)
    add_routes(app, settings, service, jobs, stores, options)
    add_replay(app, service, stores, options, decoder.decode)
    studio = mount_ui(app, settings, decoder.decode, guests, settle)
    app.include_router(health_router(missing, metrics.exposition, loaded.describe, loaded.remarks))
    return app


def _stalled(decoder: DecoderPool, jobs: JobManager) -> list[str]:
    """What has work in hand and makes no progress, in sentences."""
    return [fault for fault in (decoder.health(), jobs.health()) if fault is not None]


async def _open(settings: Settings, tracing: Tracing, stores: StorageStack, faults: dict[str, str]) -> None:
    configure_logging(settings.log_level, settings.log_format)
    tracing.open()
    await asyncio.to_thread(stores.open, faults)


async def _close(
    service: GenerationService, fetcher: ImageFetcher, decoder: DecoderPool, stores: StorageStack, tracing: Tracing
) -> None:
    service.close()
    fetcher.close()
    await decoder.close()
    await asyncio.to_thread(stores.close)
    await asyncio.to_thread(tracing.close)
