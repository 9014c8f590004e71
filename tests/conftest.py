"""Shared fixtures: an app over a fake model, the embedded models, and a server process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import structlog
from fakes import FakeDenoiser, settings_in, until
from fastapi.testclient import TestClient

from stable_diffusion_server.app import create_app

pytest_plugins = ["squares", "storage_servers", "pipeline_families", "live_servers", "browsers", "outbound_connections"]

# A test never fails for its duration: this machine, or the one that checks, may be busy.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parent.parent
# Fixtures that load a model, start a server that listens on a port, or start a browser: their tests are slow.
SLOW_FIXTURES = {"server", "live", "live_of", "registry", "sdxl", "flux", "families", "chromium"}
_SLOW_MODULE = re.compile(r"^pytestmark = (?:.*|\[\s*)pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not slow"` does not import entirely slow modules, since most of them import torch."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py" and collection_path.is_file():
        return True if _SLOW_MODULE.search(collection_path.read_text(encoding="utf-8")) else None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures, before pytest deselects by marker."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if "torch" in sys.modules:  # naming the category in pyproject.toml would import torch
            item.add_marker(pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"))


@dataclass
class RunningApp:
    """A running app, its client and its model."""

    client: TestClient
    squares: FakeDenoiser
    folder: Path

    def draw(self, **parameters: Any) -> httpx.Response:
        """One text-to-image request by query."""
        return self.client.get("/create_and_upload_image", params={"width": 64, "height": 64, **parameters})

    def metric(self, name: str) -> float:
        """A metric of `/metrics` by its full name, 0 when it does not exist yet."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """An app logs to the stderr of its own test, which is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def run_app(tmp_path: Path) -> Iterator[Callable[..., RunningApp]]:
    """Make a running app with other settings, or with another fake model."""
    open_clients: list[TestClient] = []

    def make(
        squares: FakeDenoiser | None = None, client: tuple[str, int] = ("127.0.0.1", 5), **changes: Any
    ) -> RunningApp:
        painter = squares or FakeDenoiser()
        app = create_app(settings_in(tmp_path, **changes), load=lambda settings: painter)
        test_client = TestClient(
            app, base_url="http://127.0.0.1:8000", client=client, raise_server_exceptions=False
        ).__enter__()
        open_clients.append(test_client)
        until(lambda: test_client.get("/readyz").status_code == 200)
        return RunningApp(test_client, painter, tmp_path)

    yield make
    for test_client in open_clients:
        test_client.__exit__(None, None, None)


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp]) -> RunningApp:
    """A running app over a fake model."""
    return run_app()


@pytest.fixture(scope="session")
def registry() -> Any:
    """The embedded models, loaded once, with one thread so that results do not depend on the machine."""
    from stable_diffusion_server.pipelines import registry

    return registry.load(ROOT / "models", "cpu", 1)


@dataclass
class Server:
    """A separate server process."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal the process and its children, as a terminal does; return the exit status."""
        os.killpg(self.process.pid, number)
        return self.process.wait(60)


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, port: int, *command: str, seconds: float = 120.0, **environment: str) -> Server:
    """Start a server command in `folder` with default settings, and wait until it is ready."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  # our own command, made here
            command,
            cwd=folder,
            env={**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return Server(process, url, folder, log)
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"the server did not become ready:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as `make run` starts it: a real process with the embedded models, on its own port."""
    port = free_port()
    running = start_server(
        tmp_path_factory.mktemp("server"),
        port,
        sys.executable,
        "-m",
        "stable_diffusion_server",
        "serve",
        PORT=str(port),
    )
    yield running
    running.stop()
