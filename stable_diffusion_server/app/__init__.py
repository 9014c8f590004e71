"""The composition root: builds every room from the settings, and owns the lifespan. Decides nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog
from fastapi import FastAPI

from stable_diffusion_server import __version__
from stable_diffusion_server.api import problems
from stable_diffusion_server.api.routes import health
from stable_diffusion_server.app.http import add_doors, add_middleware, add_replay
from stable_diffusion_server.app.job_services import build_jobs
from stable_diffusion_server.app.lifecycle import ClosesWhileStopping, Shutdown, drained_by_signals, leave_soon
from stable_diffusion_server.app.metrics import show
from stable_diffusion_server.app.models import Loaded, Models, build_engine, build_readers, options_of
from stable_diffusion_server.app.services import build_service
from stable_diffusion_server.app.storage import Stores
from stable_diffusion_server.app.ui import add_studio, key_of_visitor
from stable_diffusion_server.engine import Phase
from stable_diffusion_server.generation.service import Service
from stable_diffusion_server.imaging.sandbox.pool import Decoder
from stable_diffusion_server.jobs.manager import Jobs
from stable_diffusion_server.net.image_fetcher import Fetcher
from stable_diffusion_server.observability.crash_reports import DeviceRecord
from stable_diffusion_server.observability.event_loop_heartbeat import BEAT_FILE, LoopHeartbeat
from stable_diffusion_server.observability.logs import configure_logging
from stable_diffusion_server.observability.metrics import Metrics
from stable_diffusion_server.observability.tracing import Tracing
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.ui.sessions import Guests

_log = structlog.get_logger(__name__)

_TITLE, _SUMMARY = "Stable Diffusion Server", "A prompt in, the URL of a stored picture out."


def create_app(
    settings: Settings,
    load: Callable[[Settings], Models] | None = None,
    announce: Callable[[], object] = lambda: None,
    poisoned: Callable[[], object] = leave_soon,
    settle: Callable[[], object] = lambda: None,
) -> FastAPI:
    """The application over `settings`. Opens nothing and starts nothing; the lifespan does.

    `load` makes what draws, the models of the settings unless told otherwise; `announce` is called when it is done, and
    `poisoned` when the device can only be used again by another process: all of them on the engine's thread. `settle`
    is called, on any thread, when much was loaded that stays; see `settling`.
    """
    loaded, faults = Loaded.of(settings), dict[str, str]()

    def missing() -> list[str]:
        """What keeps the server from drawing, in sentences, each once; what was at fault before is looked at again."""
        if faults:
            stores.open(faults)
        found = filter(None, [*faults.values(), stores.bucket.fault(), *stalled(), *loaded.missing()])
        reasons = [*dict.fromkeys(found)]
        return [*reasons, loaded.progress() or engine.reason] if engine.phase is not Phase.READY else reasons

    metrics, tracing = Metrics(), Tracing(settings.otel_exporter_otlp_endpoint, __version__)
    record = DeviceRecord(settings.data_dir)
    ready = lambda: missing() or announce()  # noqa: E731  # a word for what follows
    engine = build_engine(settings, loaded, load, metrics, settle, ready, poisoned, record.occupied)
    stores = Stores(settings, metrics)
    options = replace(options_of(settings, loaded), ownership=stores.ownership)
    fetcher, decoder = readers = build_readers(settings)
    service = build_service(settings, engine, loaded, options, stores, readers, metrics, tracing)
    jobs = build_jobs(settings, service, stores, record)
    shutdown = Shutdown(lambda: engine.running > 0 or jobs.running > 0, settings.stop_seconds)
    stalled = partial(_stalled, decoder, jobs)
    show(metrics, __version__, engine, jobs, stores, loaded, missing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await _open(settings, tracing, stores, faults)
        engine.start()
        await jobs.start()
        async with LoopHeartbeat(settings.data_dir / BEAT_FILE, stalled):
            soon = asyncio.get_running_loop().call_soon_threadsafe
            with drained_by_signals(shutdown, engine.drain, lambda: soon(jobs.drain), lambda: soon(studio.drain)):
                yield
                grace = shutdown.seconds_left()
                await asyncio.gather(studio.close(), asyncio.to_thread(engine.stop, grace), jobs.stop(grace))
            await _close(service, fetcher, decoder, stores, tracing)

    app = FastAPI(title=_TITLE, version=__version__, summary=_SUMMARY, lifespan=lifespan, docs_url=None, redoc_url=None)
    # For what runs this app in its own way (deploy/): how much work there is, and whether it can be done.
    app.state.engine, app.state.jobs = engine, jobs
    problems.install(app)
    add_middleware(app, settings, metrics, tracing, key_of_visitor(guests := Guests()))
    app.add_middleware(ClosesWhileStopping, shutdown=shutdown)
    add_doors(app, settings, service, jobs, stores, options)
    add_replay(app, service, stores, options, decoder.decode)
    studio = add_studio(app, settings, decoder.decode, guests, settle)
    app.include_router(health.router(missing, metrics.exposition, loaded.told, loaded.remarks))
    return app


def _stalled(decoder: Decoder, jobs: Jobs) -> list[str]:
    """What has work in hand and makes no progress, in sentences."""
    return [fault for fault in (decoder.fault(), jobs.fault()) if fault is not None]


async def _open(settings: Settings, tracing: Tracing, stores: Stores, faults: dict[str, str]) -> None:
    configure_logging(settings.log_level, settings.log_format)
    tracing.open()
    await asyncio.to_thread(stores.open, faults)


async def _close(service: Service, fetcher: Fetcher, decoder: Decoder, stores: Stores, tracing: Tracing) -> None:
    service.close()
    fetcher.close()
    await decoder.close()
    await asyncio.to_thread(stores.close)
    await asyncio.to_thread(tracing.close)
