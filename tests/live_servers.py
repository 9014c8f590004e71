"""A server on a real socket over a fake model, for clients with their own HTTP stack."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeDenoiser, settings_in, until
from fastapi import FastAPI

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.http_protocol import BoundedProtocol
from stable_diffusion_server.cli import open_listener
from stable_diffusion_server.settings import Settings


@dataclass
class LiveServer:
    """A listening server and its model."""

    url: str
    squares: FakeDenoiser
    folder: Path


@contextmanager
def serving(app: FastAPI, settings: Settings, seconds: float = 30) -> Iterator[str]:
    """Serve an app on a socket, within `seconds` ready; yields its URL."""
    listening = open_listener(settings)
    quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedProtocol, proxy_headers=False, **quiet))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        until(lambda: server.started and httpx.get(f"{url}/readyz").status_code == 200, seconds=seconds)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def live_of(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server with other settings, or with another fake model."""
    with ExitStack() as running:

        def start(squares: FakeDenoiser | None = None, **changes: Any) -> LiveServer:
            painter = squares or FakeDenoiser()
            settings = settings_in(tmp_path, **{"port": 0, **changes})
            app = create_app(settings, load=lambda settings: painter)
            return LiveServer(running.enter_context(serving(app, settings)), painter, tmp_path)

        yield start
