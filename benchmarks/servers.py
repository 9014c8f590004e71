"""The servers that are compared: how each is started and called.

All run on loopback with the same weights, generate on the same canvas, and enlarge and encode alike. PEERS_PYTHON names
the interpreter with the peers' packages (LitServe, Ray), and SERVER_ASYNC the folder of diffusers' example server.
Without them those peers are left out, and the table says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpx
import psutil

from benchmarks.loopback import free_port
from stable_diffusion_server.imaging import plan_canvas
from stable_diffusion_server.pipelines import MODELS

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
FACTS = MODELS["sdxl"]
MODEL = ROOT / "models" / FACTS.folder
OURS, PLAIN = "ours", "plain FastAPI + pipeline + lock"
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")


class Tuning(NamedTuple):
    """How a server uses the cores: processes (or engine workers), threads of each, largest batch."""

    workers: int
    threads: int
    batch: int = 1

    def __str__(self) -> str:
        batch = f", batches of {self.batch}" if self.batch > 1 else ""
        return f"{self.workers} × {self.threads} thread{'s' if self.threads > 1 else ''}{batch}"


@dataclass(frozen=True)
class Entry:
    """A server that can be started: its script in peers/ (`None` is ours), its tuning, additional environment."""

    script: str | None
    tuning: Tuning
    environment: Mapping[str, str] = field(default_factory=dict)

    def with_environment(self, **further: str) -> Entry:
        """A copy with more environment variables."""
        return replace(self, environment={**self.environment, **further})


# Each peer with the best of the tunings tried (see the tuning table in results/).
ENTRIES: dict[str, Entry] = {
    OURS: Entry(None, Tuning(2, 1, 8)),
    PLAIN: Entry("plain.py", Tuning(1, 2)),
    "plain FastAPI, two processes": Entry("plain.py", Tuning(2, 1)),
    "diffusers server-async": Entry("server_async.py", Tuning(2, 1)),
    "LitServe": Entry("lit.py", Tuning(2, 1, 8)),
    "Ray Serve @serve.batch": Entry("ray_batch.py", Tuning(2, 1, 8)),
}
# The other tunings tried.
TUNINGS: dict[str, Entry] = {
    "ours, ENGINE_WORKERS=1, 1 thread": Entry(None, Tuning(1, 1, 8)),
    "ours, ENGINE_WORKERS=1, 2 threads": Entry(None, Tuning(1, 2, 8)),
    "plain, 1 thread": Entry("plain.py", Tuning(1, 1)),
    "server-async, 16 at a time": Entry("server_async.py", Tuning(16, 1)),
    "LitServe, 1 × 2": Entry("lit.py", Tuning(1, 2, 8)),
    "LitServe, 2 × 1, batches of 4": Entry("lit.py", Tuning(2, 1, 4)),
    "Ray Serve, 1 × 2": Entry("ray_batch.py", Tuning(1, 2, 8)),
    "Ray Serve, 2 × 1, batches of 4": Entry("ray_batch.py", Tuning(2, 1, 4)),
}


@dataclass
class Server:
    """A started, ready server; `ready` is the seconds from its start until it could generate."""

    name: str
    entry: Entry
    client: httpx.Client
    process: psutil.Process
    ready: float

    def request_of(self, name: str, n: int, side: int, **further: Any) -> tuple[str, dict[str, Any] | None]:
        """URL target and JSON body (`None`: a GET) of the n-th of many different requests, stored under a name."""
        if self.entry.script is None:
            return f"/create_and_upload_image?{urlencode(order_of(name, n, side) | further)}", None
        order = _peer_order(name, n, side) | further
        if self.entry.script != "server_async.py":
            return "/draw", order
        body = {"prompt": order.pop("prompt"), "num_inference_steps": 4}
        sizes = {key: value for key, value in order.items() if isinstance(value, int)}
        return f"/api/diffusers/inference?{urlencode(sizes)}", body

    def draw(self, name: str, n: int, side: int, **further: Any) -> dict[str, Any]:
        """Send the n-th of many different requests, `side` × `side`, stored under a name; returns the JSON response."""
        target, body = self.request_of(name, n, side, **further)
        answer = self.client.get(target) if body is None else self.client.post(target, json=body)
        return dict(answer.raise_for_status().json())

    @property
    def port(self) -> int:
        """Its port on loopback."""
        return self.client.base_url.port or 80

    def bare(self, name: str, n: int, side: int) -> float:
        """Seconds of the bare pipeline call and of enlarging, encoding and storing, as measured by the plain server."""
        times = self.client.post("/bare", json=_peer_order(name, n, side)).raise_for_status().json()
        return float(times["draw"] + times["keep"])

    def family(self) -> list[psutil.Process]:
        """Its process and all descendants."""
        return [self.process, *self.process.children(recursive=True)]

    def pause(self) -> None:
        """Suspend all its processes, except Ray's: Ray treats a suspended node as lost."""
        if self.entry.script != "ray_batch.py":
            for process in self.family():
                process.suspend()

    def resume(self) -> None:
        """Resume its processes."""
        for process in self.family():
            process.resume()

    def memory(self) -> float:
        """MB of all its processes; shared memory counts once."""
        return sum(process.memory_full_info().pss for process in self.family()) / 1e6

    def processor_seconds(self) -> float:
        """CPU seconds that its processes have used so far."""
        times = [process.cpu_times() for process in self.family()]
        return float(sum(time.user + time.system for time in times))


@contextmanager
def alone(server: Server) -> Iterator[None]:
    """Resume a suspended server for the block.

    Servers are suspended because several peers poll and use part of a core.
    """
    server.resume()
    try:
        yield
    finally:
        server.pause()


def order_of(name: str, n: int, side: int) -> dict[str, Any]:
    """A request in our own server's format."""
    return {"prompt": prompt(n), "seed": n, "width": side, "height": side, "save_path": f"{name}.webp"}


def _peer_order(name: str, n: int, side: int) -> dict[str, Any]:
    """A request in the peers' format, with the canvas that our server chooses."""
    canvas = plan_canvas(side, side, FACTS.native_pixels, FACTS.min_side)
    size = {"width": side, "height": side, "canvas_width": canvas.width, "canvas_height": canvas.height}
    return {"prompt": prompt(n), "seed": n, "name": name, **size}


def prompt(n: int) -> str:
    """One of 112 different prompts."""
    background = COLOURS[(n + 1 + n // 16 % 7) % 8]
    return f"a {COLOURS[n % 8]} {('circle', 'square')[n // 8 % 2]} on a {background} background"


def available(names: list[str] | None = None) -> dict[str, Entry]:
    """The entries of these names (by default all competitors) that can be started here."""
    entries = {name: {**ENTRIES, **TUNINGS}[name] for name in names or ENTRIES}
    lacking = {
        script
        for script, variable in (
            ("lit.py", "PEERS_PYTHON"),
            ("ray_batch.py", "PEERS_PYTHON"),
            ("server_async.py", "SERVER_ASYNC"),
        )
        if not os.environ.get(variable)
    }
    return {name: entry for name, entry in entries.items() if entry.script not in lacking}


@contextmanager
def servers(entries: Mapping[str, Entry]) -> Iterator[dict[str, Server]]:
    """Start the servers of these entries one after the other, each in an empty folder; stop them at the end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield {
                name: start(name, entry, Path(folder) / str(number), processes.append)
                for number, (name, entry) in enumerate(entries.items())
            }
        finally:
            for process in processes:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a server, and kill what remains of its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(name: str, entry: Entry, home: Path, started: Callable[[subprocess.Popen[bytes]], None]) -> Server:
    """Start a server and wait until it is ready."""
    home.mkdir(parents=True)
    port, tuning = free_port(), entry.tuning
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PORT": str(port),
        "OMP_NUM_THREADS": str(tuning.threads),
        **entry.environment,
    }
    if entry.script is None:
        command = [sys.executable, "-m", "stable_diffusion_server", "serve"]
        environment |= {
            "PYTHONPATH": str(ROOT),
            "LOG_LEVEL": "error",
            "MODELS": "embedded",
            "QUEUE_LIMIT": "128",
            "MAX_BATCH": str(tuning.batch),
            "ENGINE_WORKERS": str(tuning.workers),
            "CPU_THREADS": str(tuning.workers * tuning.threads),
            **entry.environment,
        }
    else:
        python = os.environ.get("PEERS_PYTHON") if entry.script != "plain.py" else None
        command = [python or sys.executable, str(PEERS / entry.script)]
        environment |= {
            "MODEL": str(MODEL),
            "THREADS": str(tuning.threads),
            "WORKERS": str(tuning.workers),
            "BATCH": str(tuning.batch),
            "PICTURES": str(home),
            "SERVER_ASYNC": os.environ.get("SERVER_ASYNC", ""),
        }
    began = time.perf_counter()
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # our own
            command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    started(process)
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        timeout=600,
        limits=httpx.Limits(max_connections=128, max_keepalive_connections=128),
    )
    wait_until_it_draws(client, process, "/readyz" if entry.script is None else "/health", home / "log")
    return Server(name, entry, client, psutil.Process(process.pid), time.perf_counter() - began)


def wait_until_it_draws(client: httpx.Client, process: subprocess.Popen[bytes], path: str, log: Path) -> None:
    """Poll until the status is 200, for some minutes at most. If the server ends, exits with its log."""
    for _ in range(6000):
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            raise SystemExit(f"a server ended: {log.read_text()[-2000:]}")
        time.sleep(0.05)
    raise SystemExit(f"a server did not become ready: {log.read_text()[-2000:]}")
