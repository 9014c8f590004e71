"""Measures the cost of the web UI: server start with and without it, memory, time until a page is usable.

    python -m benchmarks.studio_cost [rounds]

Everything it starts listens on loopback and ends with it; loops are bounded. Pages need Debian's Chromium.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.loopback import say
from scripts.browser import CHROMIUM, DESK, chromium, draw, open_tab, starting, studio

_PAUSE, _LONGEST = 0.02, 180.0


@dataclass
class Running:
    """A ready server; seconds from its start until it responded and until it could generate."""

    client: httpx.Client
    pid: int
    answering: float
    drawing: float

    @property
    def megabytes(self) -> float:
        """Resident memory in MB."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1000


def main() -> None:
    """Start servers with and without the UI in turn, then open the UI of one."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    starts: dict[str, list[tuple[float, float, float]]] = {"1": [], "0": []}
    for _ in range(rounds):
        for ui, seen in starts.items():
            with server(ui) as running:
                seen.append((running.answering, running.drawing, running.megabytes))
    say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {rounds} rounds\n")
    say("| median (least to most) | with the studio | without (UI=0) |\n| --- | --- | --- |")
    for place, what in enumerate(("start to answering, s", "start to able to draw, s", "memory then, MB")):
        reported = (spread([each[place] for each in starts[ui]]) for ui in ("1", "0"))
        say(f"| {what} | {' | '.join(reported)} |")
    say("\n| the studio of one server | measured |\n| --- | --- |")
    with server("1") as running:
        opened(running, rounds)


@contextmanager
def server(ui: str) -> Iterator[Running]:
    """A separate server process, stopped afterwards."""
    started = time.perf_counter()
    with starting(UI=ui, MODELS="embedded") as (process, client):
        answering = after(started, lambda: client.get("/healthz").is_success)
        drawing = after(started, lambda: client.get("/readyz").is_success)
        yield Running(client, process.pid, answering, drawing)


def opened(running: Running, rounds: int) -> None:
    """Open the UI for the first time, then more of its pages."""
    before = running.megabytes
    started = time.perf_counter()
    after(started, lambda: "gradio" in running.client.get("/ui/").text)
    say(f"| first request of /ui to the studio's page | {time.perf_counter() - started:.1f} s |")
    say(f"| memory for that | {running.megabytes - before:.0f} MB on top of {before:.0f} MB |")
    if not CHROMIUM.exists():
        return
    url = str(running.client.base_url).rstrip("/")
    pages = []
    with chromium() as browser:
        for _ in range(rounds):
            started = time.perf_counter()
            page = studio(browser, url, **DESK)  # this page's cache is empty
            pages.append(time.perf_counter() - started)
            page.context.close()
        say(f"| page asked for to every field usable, empty cache, s | {spread(pages)} |")
        page = studio(browser, url, **DESK)
        pages = []
        for _ in range(rounds):
            started = time.perf_counter()
            page.reload()
            page.get_by_label("Prompt", exact=True).first.fill("a red circle on a blue background")
            pages.append(time.perf_counter() - started)
        say(f"| page loaded again to a prompt written in it, s | {spread(pages)} |")
        before = running.megabytes
        draw(open_tab(page, "Create"), "a red circle on a blue background")
        say(f"| memory for a picture drawn in it | {running.megabytes - before:.0f} MB |")


def after(started: float, holds: Callable[[], bool]) -> float:
    """Seconds from `started` until a condition holds."""
    while time.perf_counter() - started < _LONGEST:
        try:
            if holds():
                return time.perf_counter() - started
        except httpx.TransportError:
            pass
        time.sleep(_PAUSE)
    raise SystemExit("a server did not come")


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
