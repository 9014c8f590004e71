"""Builds the way into the studio, over the server's own doors."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import limits as rates
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.routing import Route

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
    app: FastAPI, settings: Settings, decode: DecodeUpload, guests: SessionStore, settle: Callable[[], object]
) -> LazyUiApp:
    """The way in, set into the app unless UI=0. Nothing of Gradio is loaded before someone asks for it.

    `decode` is the sandboxed decoder, `guests` are who has shown a key. `settle` is called when Gradio is loaded, on a
    thread.
    """
    desks = ApiClients(httpx.AsyncClient(transport=StreamingASGITransport(app)), guests)
    intake = ImageIntake(decode, UploadStore(_limits(settings)), settings.max_image_bytes)

    def build() -> FastAPI:
        configure_gradio((settings.data_dir / "studio").resolve())
        # Imported here, on a thread: it takes seconds.
        from stable_diffusion_server.ui.tabs import blocks

        built = blocks.build(desks, intake, rates.parse(settings.ui_rate_limit) if settings.ui_rate_limit else None)
        settle()
        return built

    keyed = bool(settings.read_keys())
    entrance = LazyUiApp(build, desks, UploadRoutes(intake), keyed=keyed, sources=_sources(settings))
    if settings.ui:
        app.router.routes.append(Route("/favicon.ico", favicon, include_in_schema=False))
        for path in ("/ui", "/ui/{rest:path}"):
            app.router.routes.append(Route(path, entrance, include_in_schema=False))
    return entrance


def key_of_visitor(guests: SessionStore) -> Callable[[Headers], str | None]:
    """What tells the key that the visitor of a page has shown, from the headers of a request."""
    return lambda headers: guests.key_of(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))


def _limits(settings: Settings) -> UploadLimits:
    return UploadLimits(
        pictures=settings.ui_uploads,
        bytes=settings.ui_upload_bytes,
        total_bytes=settings.ui_upload_total_bytes,
        seconds=settings.ui_upload_seconds,
    )


def _sources(settings: Settings) -> set[str]:
    """Where the bucket's pictures come from, as a browser is to be told."""
    if settings.storage_provider == "local":
        return set()
    named = {settings.public_base_url, settings.r2_endpoint_url}
    origins = {f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, named) if parts.netloc}
    return origins or {_GOOGLE if settings.storage_provider == "gcs" else _AMAZON}
