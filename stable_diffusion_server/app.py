"""The composition root: builds every room from the settings, and owns the lifespan. Decides nothing else."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import FrameType
from typing import Any, Protocol

import structlog
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware

from stable_diffusion_server import __version__
from stable_diffusion_server.api import handlers, ops, uploads
from stable_diffusion_server.api.security import BodyLimit, Gate, Policy, allowed_host_names
from stable_diffusion_server.bucket_api import Bucket, StorageOptions, open_bucket, url_path
from stable_diffusion_server.buckets.local import LocalBucket
from stable_diffusion_server.decoding.pool import Decoder
from stable_diffusion_server.engine import Denoiser, Engine, Phase
from stable_diffusion_server.errors import NotReady, ServerError
from stable_diffusion_server.fetching.fetcher import Bounds, Fetcher
from stable_diffusion_server.fetching.targets import Allowance
from stable_diffusion_server.limits import Limits
from stable_diffusion_server.observability import ConsoleProgress, Heartbeat, Metrics, configure_logging, each
from stable_diffusion_server.orders import Stored
from stable_diffusion_server.resolving import Options
from stable_diffusion_server.service import Service
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.spool.files import Spool
from stable_diffusion_server.spool.remembering import Remembering
from stable_diffusion_server.spool.spooling import Spooling

_log = structlog.get_logger(__name__)

STOP_GRACE_SECONDS = 30.0


class Models(Denoiser[Any, Any], Protocol):
    """What draws, and what counts a prompt's tokens as the model reads them."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Safe from any thread."""


@dataclass(slots=True)
class _Loaded:
    """The loaded models, once there are any. Filled by the engine's thread."""

    models: Models | None = None

    def count_tokens(self, model: str, prompt: str) -> int:
        """Length of a prompt in a model's tokens. Raises `NotReady` until the models are loaded."""
        if self.models is None:
            raise NotReady("The models are loading.", retry_after=5)
        return self.models.count_tokens(model, prompt)


def create_app(
    settings: Settings,
    load: Callable[[Settings], Models] | None = None,
    announce: Callable[[], object] = lambda: None,
) -> FastAPI:
    """The application over `settings`. Opens nothing and starts nothing; the lifespan does.

    `load` makes what draws, the models of the settings unless told otherwise; `announce` is called when it is done.
    Both run on the engine's thread.
    """
    loaded, faults = _Loaded(), dict[str, str]()

    def missing() -> list[str]:
        """What keeps the server from drawing, in sentences; what was at fault before is looked at again."""
        if faults:
            _open_folders(settings, bucket, faults)
        reasons = [*faults.values(), *filter(None, [bucket.fault()])]
        return [*reasons, engine.reason] if engine.phase is not Phase.READY else reasons

    def ready() -> None:
        if not missing():
            announce()

    engine, metrics = _build_engine(settings, loaded, load or _load_models, ready)
    bucket = _bucket(settings)
    options = _options(settings)
    fetcher, decoder = _readers(settings)
    fetch, decode, known = fetcher.fetch, decoder.decode, _known(bucket)
    answered, count = metrics.answered, loaded.count_tokens
    service = Service(bucket, engine, count, options, answered, fetch=fetch, decode=decode, known=known)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings.log_level, settings.log_format)
        # Its lines hold query strings, and so prompts; Gate logs requests instead.
        logging.getLogger("uvicorn.access").disabled = True
        await asyncio.to_thread(_open_folders, settings, bucket, faults)
        engine.start()
        with _drained_by_signals(engine):
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
    _add_middleware(app, settings)
    app.include_router(uploads.router(service, options.limits, _url_maker(settings, bucket)))
    app.include_router(ops.router(missing, metrics.exposition))
    folder = f"{settings.bucket_path.strip('/')}/".lstrip("/")
    app.include_router(ops.files_router(bucket, folder, private=settings.signed_url_seconds > 0))
    return app


def _bucket(settings: Settings) -> Bucket:
    """The bucket of the settings; one that is elsewhere has a spool before it, and a memory of what it holds."""
    bucket = open_bucket(StorageOptions.of(settings))
    if isinstance(bucket, LocalBucket):
        return bucket
    spool = Spool(settings.data_dir / "spool", settings.spool_bytes)
    return Remembering(Spooling(bucket, spool, settings.storage_timeout), settings.known_keys, settings.known_seconds)


def _options(settings: Settings) -> Options:
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


def _readers(settings: Settings) -> tuple[Fetcher, Decoder]:
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


def _load_models(settings: Settings) -> Models:
    # Imported here, on the engine's thread: torch takes seconds, and the port should answer meanwhile.
    from stable_diffusion_server.pipelines import registry

    return registry.load(settings.models_dir, settings.device, settings.cpu_threads)


def _build_engine(
    settings: Settings, loaded: _Loaded, load: Callable[[Settings], Models], ready: Callable[[], object]
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


@contextmanager
def _drained_by_signals(engine: Engine[Any, Any]) -> Iterator[None]:
    """Have a signal to end drain the engine at once, before whatever the server program does with it.

    uvicorn waits for open connections first, and those wait for pictures.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a test's event loop: signals are not its business
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def drain(number: int, frame: FrameType | None) -> None:
        # On a thread of its own: a handler may interrupt the holder of the very lock it needs.
        threading.Thread(target=engine.drain, name="drain").start()
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    for number in before:
        signal.signal(number, drain)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_folders(settings: Settings, bucket: Any, faults: dict[str, str]) -> None:
    """Make the folders ready; what cannot be is kept in `faults` for `/readyz`, and the rest is served."""
    faults.clear()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        faults["data"] = f"DATA_DIR cannot be used ({error.strerror})."
    try:
        bucket.open()
    except ServerError as error:
        faults["bucket"] = error.detail
    for fault in faults.values():
        _log.error("not able to draw", reason=fault)


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """What every request passes, the last added first: CORS (refusals need its headers), gate, count of bytes."""
    policy = Policy(
        hosts=allowed_host_names(settings.host, settings.allowed_hosts, settings.public_base_url),
        origins=frozenset(settings.cors_origins),
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
        allow_anonymous=settings.allow_anonymous,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
    )
    app.add_middleware(BodyLimit, policy=policy)
    app.add_middleware(Gate, policy=policy)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )


def _known(bucket: Bucket) -> Callable[[str], Stored | None]:
    """What the bucket knows of a key without asking anyone."""
    return bucket.known if isinstance(bucket, Remembering) else lambda key: None


def _url_maker(settings: Settings, bucket: Bucket) -> Any:
    """How a key becomes a URL: the bucket's own, else this server's.

    This server is PUBLIC_BASE_URL, where that is not the bucket's, else the address the client's connection came in
    on; never the Host header, which the client writes.
    """
    public = settings.public_base_url if settings.storage_provider == "local" else ""

    def url_of(request: Request, key: str) -> str:
        if (url := bucket.url(key)) is not None:
            return url
        base = public
        if not base:
            host, port = request.scope.get("server") or (settings.host, settings.port)
            name = f"[{host}]" if ":" in host else host
            # A forwarded scheme may be a websocket's.
            scheme = "https" if request.scope["scheme"] in ("https", "wss") else "http"
            base = f"{scheme}://{name}:{port or settings.port}"
        return f"{base}/files/{url_path(key)}"

    return url_of
