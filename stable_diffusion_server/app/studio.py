"""Builds the way into the studio, over the server's own doors."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI
from starlette.routing import Route

from stable_diffusion_server.settings import Settings
from stable_diffusion_server.settings.surroundings import quieten_gradio
from stable_diffusion_server.ui import pages
from stable_diffusion_server.ui.desks import Desks
from stable_diffusion_server.ui.entrance import Entrance
from stable_diffusion_server.ui.inside import Inside

_GOOGLE, _AMAZON = "https://storage.googleapis.com", "https://*.amazonaws.com"


def add_studio(app: FastAPI, settings: Settings, settle: Callable[[], object]) -> Entrance:
    """The way in, set into the app unless UI=0. Nothing of Gradio is loaded before someone asks for it.

    `settle` is called when it is, on a thread.
    """
    desks = Desks(httpx.AsyncClient(transport=Inside(app)))

    def build() -> FastAPI:
        quieten_gradio((settings.data_dir / "studio").resolve())
        # Imported here, on a thread: it takes seconds.
        from stable_diffusion_server.ui.tabs import studio

        built = studio.build(desks, settings.max_upload_bytes)
        settle()
        return built

    entrance = Entrance(build, desks, keyed=bool(settings.read_keys()), sources=_sources(settings))
    if settings.ui:
        app.router.routes.append(Route("/favicon.ico", pages.icon, include_in_schema=False))
        for path in ("/ui", "/ui/{rest:path}"):
            app.router.routes.append(Route(path, entrance, include_in_schema=False))
    return entrance


def _sources(settings: Settings) -> set[str]:
    """Where the bucket's pictures come from, as a browser is to be told."""
    if settings.storage_provider == "local":
        return set()
    named = {settings.public_base_url, settings.r2_endpoint_url}
    origins = {f"{parts.scheme}://{parts.netloc}" for parts in map(urlsplit, named) if parts.netloc}
    return origins or {_GOOGLE if settings.storage_provider == "gcs" else _AMAZON}
