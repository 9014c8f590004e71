"""A server on a real socket over a fake model, for clients with their own HTTP stack."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import FakeDenoiser, settings_in, until

from stable_diffusion_server.app import create_app
from stable_diffusion_server.app.http_protocol import BoundedProtocol
from stable_diffusion_server.cli import open_listener


@dataclass
class LiveServer:
    """A listening server and its model."""

    url: str
    squares: FakeDenoiser
    folder: Path


@pytest.fixture
def live_of(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server with other settings, or with another fake model."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(squares: FakeDenoiser | None = None, **changes: Any) -> LiveServer:
        painter = squares or FakeDenoiser()
        settings = settings_in(tmp_path, **{"port": 0, **changes})
        listening = open_listener(settings)
        app = create_app(settings, load=lambda settings: painter)
        quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "log_config": None}
        config = uvicorn.Config(app, http=BoundedProtocol, proxy_headers=False, **quiet)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        until(lambda: server.started and httpx.get(f"{url}/readyz").status_code == 200)
        return LiveServer(url, painter, tmp_path)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(30)
