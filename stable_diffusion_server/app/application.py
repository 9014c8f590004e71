"""Builds the application from the settings, and opens and closes its components."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI

from stable_diffusion_server import __version__
from stable_diffusion_server.api import health_router, install_exception_handlers
from stable_diffusion_server.app.http import add_middleware, add_replay, add_routes
from stable_diffusion_server.app.lifecycle import CloseConnectionsMiddleware, ProcessHooks, Shutdown, drain_on_signal
from stable_diffusion_server.app.metrics import register_metrics
from stable_diffusion_server.app.model_manager import ModelManager
from stable_diffusion_server.app.model_state import ModelBackend, ModelState
from stable_diffusion_server.app.models import build_engine, generation_options, prompt_expander
from stable_diffusion_server.app.readiness import Readiness
from stable_diffusion_server.app.services import ImageReaders, PictureVision, build_jobs, build_service
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.app.ui import mount_ui, visitor_key
from stable_diffusion_server.app.upscalers import Upscalers
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

_TITLE, _SUMMARY = "Stable Diffusion Server", "A prompt in, the URL of a stored picture out."
_NO_HOOKS = ProcessHooks()


def create_app(
    settings: Settings,
    load: Callable[[Settings], ModelBackend] | None = None,
    hooks: ProcessHooks = _NO_HOOKS,
) -> FastAPI:
    """Build the application. Opens and starts nothing before its lifespan begins.

    `load` returns the model backend, by default with the models in the settings; it runs on the engine's thread.
    `hooks` receives events that concern the process. Raises `SettingsError` for a model that is not in the catalogue.
    """
    models = ModelState.of(settings)
    metrics, tracing = Metrics(), Tracing(settings.otel_exporter_otlp_endpoint, __version__)
    record = DeviceRecord(settings.data_dir)
    stores = StorageStack(settings, metrics)
    readiness = Readiness(models, stores)
    engine = build_engine(settings, models, load, metrics, hooks, readiness, record)
    readers, vision, upscalers = ImageReaders.of(settings), PictureVision.of(settings), Upscalers(settings)
    options = vision.offered(replace(generation_options(settings, models, stores), upscaler=upscalers))
    expander, decode = prompt_expander(settings), readers.decoder.decode
    service = build_service(settings, engine, models, options, stores, readers, metrics, tracing, expander)
    jobs = build_jobs(settings, service, stores, record)
    readiness.watch(engine, readers.decoder, jobs)
    shutdown = Shutdown(lambda: engine.running > 0 or jobs.running > 0, settings.shutdown_grace_seconds)
    register_metrics(metrics, __version__, engine, jobs, stores, models, readiness)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings.log_level, settings.log_format)
        tracing.open()
        await asyncio.to_thread(readiness.open_stores)
        engine.start()
        await jobs.start()
        async with LoopHeartbeat(settings.data_dir / HEARTBEAT_FILE, readiness.stalled):
            soon = asyncio.get_running_loop().call_soon_threadsafe
            with drain_on_signal(
                shutdown, engine.drain, lambda: soon(jobs.drain), lambda: soon(ui.drain), lambda: soon(agents.drain)
            ):
                yield
                grace = shutdown.seconds_left()
                await asyncio.gather(ui.close(), asyncio.to_thread(engine.stop, grace), jobs.stop(grace))
            service.close()
            await asyncio.gather(agents.close(), readers.close(), vision.worker.close())
            await asyncio.to_thread(stores.close)
            await asyncio.to_thread(tracing.close)

    app = FastAPI(title=_TITLE, version=__version__, summary=_SUMMARY, lifespan=lifespan, docs_url=None, redoc_url=None)
    # For programs that host this app (deploy/): amount of work, and whether the engine is ready.
    app.state.engine, app.state.jobs = engine, jobs
    install_exception_handlers(app)
    sessions = SessionStore()
    add_middleware(app, settings, metrics, tracing, visitor_key(sessions))
    app.add_middleware(CloseConnectionsMiddleware, shutdown=shutdown)
    manager = ModelManager(settings, models, engine)
    agents = add_routes(app, settings, service, jobs, stores, options, models, decode, manager, expander, upscalers)
    add_replay(app, service, stores, options, readers)
    ui = mount_ui(app, settings, decode, sessions, hooks)
    app.include_router(
        health_router(readiness.missing, metrics.exposition, models.describe, models.remarks, models.may_use)
    )
    return app
