"""Mounts the web UI, a client of the server's own HTTP API."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import limits as rates
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.routing import Route

from stable_diffusion_server.app.lifecycle import ProcessHooks
from stable_diffusion_server.settings import Settings, configure_gradio
from stable_diffusion_server.ui import (
    COOKIE,
    ApiClients,
    DecodeUpload,
    ImageIntake,
    LazyUiApp,
    SessionStore,
    StreamingASGITransport,
    UploadLimits,
    UploadRoutes,
    UploadStore,
    favicon,
)

_GOOGLE, _AMAZON = "https://storage.googleapis.com", "https://*.amazonaws.com"


def mount_ui(
    app: FastAPI, settings: Settings, decode: DecodeUpload, sessions: SessionStore, hooks: ProcessHooks
) -> LazyUiApp:
    """Add the UI's routes, unless UI=0. A thread loads Gradio when a visitor first opens the page.

    `decode` is the sandboxed decoder; `sessions` holds the API keys that visitors have entered.
    """
    clients = ApiClients(httpx.AsyncClient(transport=StreamingASGITransport(app)), sessions)
    intake = ImageIntake(decode, UploadStore(_limits(settings)), settings.max_image_bytes)

    def build() -> FastAPI:
        configure_gradio((settings.data_dir / "studio").resolve())
        # Imported on a thread, because the import takes seconds.
        from stable_diffusion_server.ui.tabs import blocks

        built = blocks.build(clients, intake, rates.parse(settings.ui_rate_limit) if settings.ui_rate_limit else None)
        hooks.libraries_loaded()
        return built

    keyed = bool(settings.read_keys())
    lazy_app = LazyUiApp(build, clients, UploadRoutes(intake), keyed=keyed, sources=_sources(settings))
    if settings.ui:
        app.router.routes.append(Route("/favicon.ico", favicon, include_in_schema=False))
        for path in ("/ui", "/ui/{rest:path}"):
            app.router.routes.append(Route(path, lazy_app, include_in_schema=False))
    return lazy_app


def visitor_key(sessions: SessionStore) -> Callable[[Headers], str | None]:
    """Return a function from a request's headers (cookie) to the API key that the UI's visitor entered."""
    return lambda headers: sessions.key_of(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))


def _limits(settings: Settings) -> UploadLimits:
    return UploadLimits(
        pictures=settings.ui_uploads,
        bytes=settings.ui_upload_bytes,
        total_bytes=settings.ui_upload_total_bytes,
        seconds=settings.ui_upload_seconds,
    )


def _sources(settings: Settings) -> set[str]:
    """Return the origins from which UI pages may load images, for their Content-Security-Policy."""
    if settings.storage_provider == "local":
        return set()
    named = {settings.public_base_url, settings.r2_endpoint_url}
    origins = {f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, named) if parts.netloc}
    return origins or {_GOOGLE if settings.storage_provider == "gcs" else _AMAZON}
