"""Runs the web UI alone, for a server elsewhere (`--server URL --key …`), or together with a server."""

import argparse
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import limits
import uvicorn
from fastapi import FastAPI
from starlette.routing import Route

from stable_diffusion_server.api import AccessMiddleware, AccessPolicy, BodyLimitMiddleware, TrustedProxies
from stable_diffusion_server.cli import main as command
from stable_diffusion_server.imaging import DecoderPool
from stable_diffusion_server.settings import configure_gradio
from stable_diffusion_server.ui import ApiClients, ImageIntake, LazyUiApp, UploadRoutes, UploadStore, favicon

# Defaults of MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE and UI_RATE_LIMIT.
_FILE_BYTES, _PIXELS, _SIDE, _EVENTS = 20_971_520, 16_777_216, 16_383, "1200/minute"


def main() -> None:
    """Serve the UI on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="URL of the server; without it one is started here")
    parser.add_argument("--key", default="", help="API key for the server")
    parser.add_argument("--port", type=int, default=7860)
    given = parser.parse_args()
    if not given.server:
        command(["serve"])
        return
    uvicorn.run(
        create_app(given.server.rstrip("/"), given.key),
        port=given.port,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )


def create_app(server: str, key: str) -> FastAPI:
    """Build the UI for `server`. The access policy admits programs on this machine, but no pages of other sites."""
    clients = ApiClients(httpx.AsyncClient(), base=server, key=key)

    policy = AccessPolicy()
    decoder = DecoderPool(max_bytes=_FILE_BYTES, max_pixels=_PIXELS, max_side=_SIDE)
    intake = ImageIntake(decoder.decode, UploadStore(), _FILE_BYTES)

    def build() -> FastAPI:
        configure_gradio(Path(tempfile.gettempdir()) / "studio")
        # Imported on a thread: it takes seconds.
        from stable_diffusion_server.ui.tabs import blocks

        return blocks.build(clients, intake, limits.parse(_EVENTS))

    parts = urlsplit(server)
    sources = {f"{parts.scheme}://{parts.netloc}"}
    lazy_app = LazyUiApp(build, clients, UploadRoutes(intake), keyed=False, sources=sources)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await lazy_app.close()
        await decoder.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    for path in ("/ui", "/ui/{rest:path}"):
        app.router.routes.append(Route(path, lazy_app))
    app.router.routes.append(Route("/favicon.ico", favicon))
    app.add_middleware(BodyLimitMiddleware, policy=policy)
    app.add_middleware(AccessMiddleware, policy=policy, proxies=TrustedProxies())
    return app


if __name__ == "__main__":
    main()
