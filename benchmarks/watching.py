"""Shared by long measurements: a server, its memory, descriptors and health over time, and plots of them."""

from __future__ import annotations

import http.client
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import psutil
from loopback import free_port, wait_for

ROOT = Path(__file__).resolve().parent.parent
SERVE = (sys.executable, "-m", "stable_diffusion_server", "serve")
_COLOURS = ("#2458a6", "#b3452c", "#3c7d3f", "#7a4fa3")


@contextmanager
def serving(folder: Path, command: Sequence[str] = SERVE, **settings: str) -> Iterator[tuple[str, int]]:
    """Start a ready server with the embedded models and one PyTorch thread; yields its URL and pid."""
    port = free_port()
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(folder), "LOG_LEVEL": "error"}
    environment |= {"OMP_NUM_THREADS": "1", "PORT": str(port), "MODELS": "embedded", **settings}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)  # noqa: S603  # our own
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(client)
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        server.terminate()
        server.wait(60)


@dataclass
class Watch:
    """Samples a process every `every` seconds on its own thread: seconds, megabytes, descriptors, threads.

    Megabytes are the process's own resident memory; `children` counts its child processes.
    """

    pid: int
    every: float = 5.0
    at: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    children: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        """Start sampling."""
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        """Stop after one last sample."""
        self._stop.set()
        self._thread.join()

    def reported(self) -> list[str]:
        """Rows of a table: memory, descriptors and threads at every tenth of the time."""
        tenths = [round(tenth * (len(self.at) - 1) / 10) for tenth in range(11)]
        looked_at = {"memory in MB": self.memory, "descriptors": self.descriptors, "threads": self.threads}
        return [
            f"| {name}, at every tenth of the time | {', '.join(f'{values[tenth]:.0f}' for tenth in tenths)} |"
            for name, values in looked_at.items()
        ]

    def _run(self) -> None:
        process = psutil.Process(self.pid)
        last = False
        while not last:
            last = self._stop.wait(self.every if self.at else 0)
            with suppress(psutil.Error):
                self.memory.append(process.memory_info().rss / 1e6)
                self.descriptors.append(process.num_fds())
                self.threads.append(process.num_threads())
                self.children.append(len(process.children()))
                self.at.append(time.monotonic() - self._began)


@contextmanager
def asked_for_health(url: str, every: float = 0.05) -> Iterator[list[float]]:
    """Poll `/healthz` from a separate process; the yielded list holds each latency in seconds after the block."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_ask, args=(url, every, theirs), daemon=True)
    process.start()
    seconds: list[float] = []
    try:
        yield seconds
    finally:
        ours.send("stop")
        seconds += ours.recv()
        process.join(30)


def _ask(url: str, every: float, pipe: Connection) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    seconds: list[float] = []
    line = http.client.HTTPConnection(host, int(port), timeout=30)
    while not pipe.poll(every):
        started = time.perf_counter()
        line.request("GET", "/healthz")
        answer = line.getresponse()
        answer.read()
        seconds.append(time.perf_counter() - started if answer.status == 200 else math.inf)
    pipe.send(seconds)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share (0 to 1) of the values does not exceed, by nearest rank; NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def milliseconds(values: Sequence[float]) -> str:
    """Format median, 99th percentile and maximum of some seconds, in milliseconds."""
    half, most, longest = (1000 * percentile(values, share) for share in (0.5, 0.99, 1.0))
    return f"{half:.1f} / {most:.1f} / {longest:.1f}"


def machine() -> str:
    """The machine, in one line."""
    return f"{platform.machine()}, {os.cpu_count()} cores, no GPU, Python {platform.python_version()}"


def plotted(title: str, at: Sequence[float], series: Mapping[str, Sequence[float]]) -> str:
    """An SVG with one strip per series over the same minutes, each with its own scale from 0."""
    width, strip, left, top = 860, 130, 80, 34
    height = top + strip * len(series) + 40
    longest = max(at) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20" font-size="14">{title}</text>',
    ]
    span = width - left - 20
    for number, (name, values) in enumerate(series.items()):
        base = top + strip * (number + 1) - 14
        tall, most = strip - 40, max(values) * 1.1 or 1.0
        points = " ".join(
            f"{left + span * second / longest:.1f},{base - tall * value / most:.1f}"
            for second, value in zip(at, values, strict=True)
        )
        colour = _COLOURS[number % len(_COLOURS)]
        parts += [
            f'<text x="{left}" y="{base - tall - 6}" fill="{colour}">{name}</text>',
            f'<path d="M{left},{base - tall} V{base} H{left + span}" stroke="#999" fill="none"/>',
            f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>',
            f'<text x="{left - 6}" y="{base - tall + 10}" text-anchor="end">{most:.0f}</text>',
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        ]
    for tenth in range(11):
        x = left + span * tenth / 10
        parts.append(f'<text x="{x:.0f}" y="{height - 22}" text-anchor="middle">{longest * tenth / 600:.1f}</text>')
    parts += [f'<text x="{left + span / 2:.0f}" y="{height - 6}" text-anchor="middle">minutes</text>', "</svg>\n"]
    return "\n".join(parts)
