"""The studio alone, over a server that runs elsewhere (`--server URL --key …`), or with a server of its own."""

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

# As the settings of a server begin.
_FILE_BYTES, _PIXELS, _SIDE, _EVENTS = 20_971_520, 16_777_216, 16_383, "1200/minute"


def main() -> None:
    """Serve the studio on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="", help="address of the server; without it one is started here")
    parser.add_argument("--key", default="", help="key to ask it with")
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
    """The studio over `server`; the gate lets programs on this machine in, and no web page of others."""
    desks = ApiClients(httpx.AsyncClient(), base=server, key=key)

    policy = AccessPolicy()
    decoder = DecoderPool(max_bytes=_FILE_BYTES, max_pixels=_PIXELS, max_side=_SIDE)
    intake = ImageIntake(decoder.decode, UploadStore(), _FILE_BYTES)

    def build() -> FastAPI:
        configure_gradio(Path(tempfile.gettempdir()) / "studio")
        # Imported here, on a thread: it takes seconds.
        from stable_diffusion_server.ui.tabs import blocks

        return blocks.build(desks, intake, limits.parse(_EVENTS))

    parts = urlsplit(server)
    sources = {f"{parts.scheme}://{parts.netloc}"}
    entrance = LazyUiApp(build, desks, UploadRoutes(intake), keyed=False, sources=sources)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await entrance.close()
        await decoder.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    for path in ("/ui", "/ui/{rest:path}"):
        app.router.routes.append(Route(path, entrance))
    app.router.routes.append(Route("/favicon.ico", favicon))
    app.add_middleware(BodyLimitMiddleware, policy=policy)
    app.add_middleware(AccessMiddleware, policy=policy, proxies=TrustedProxies())
    return app


if __name__ == "__main__":
    main()
