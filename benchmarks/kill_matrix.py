"""Sends every signal to every process of a running server, idle and under load, and prints each result.

    python benchmarks/kill_matrix.py [signals, targets or loads to keep, as in KILL worker]

Runs the real server under its watchdog, with the embedded models. If the watchdog dies too, this program starts the
server again at once, as systemd or Docker would. Under load there are ten accepted jobs and four synchronous requests.
Needs Linux.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from loopback import free_port, say
from watching import ROOT, machine

CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
JOBS, WAITING = 10, 4
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
TARGETS = ("worker", "watchdog", "tree")
LOADS = ("idle", "load")
SMALL: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 8}


@dataclass
class Cell:
    """A signal to a process of the server, and the result."""

    number: signal.Signals
    target: str
    load: str
    accepted: int = 0
    lost: int = 0
    recovered: float = 0.0
    finished: float = 0.0
    by: str = ""
    attempts: str = ""
    answers: str = ""
    left_over: int = 0

    def row(self) -> str:
        """A row of the table."""
        name = self.number.name.removeprefix("SIG")
        ends = f"{self.finished:.1f}" if self.load == "load" else "–"
        return (
            f"| {name} | {self.target} | {self.load} | {self.by} | {self.recovered:.1f} | {ends} | "
            f"{self.accepted} | {self.lost} | {self.attempts} | {self.answers or '–'} | {self.left_over} |"
        )


@dataclass
class SimulatedServer:
    """A folder and a port for one server after another."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server under its watchdog without waiting for it."""
        environment = {"PYTHONPATH": str(ROOT), "PORT": str(self.port), "PATH": os.environ["PATH"]}
        environment |= {"MODELS": "embedded", "OMP_NUM_THREADS": "1", "LOG_LEVEL": "error", "HOME": str(self.folder)}
        serve = [sys.executable, "-m", "stable_diffusion_server", "serve"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  # our own server
                [sys.executable, "-m", "stable_diffusion_server.watchdog", "--", *serve],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pids(self) -> list[int]:
        """Pids of the watchdog and all its descendants."""
        assert self.process is not None  # noqa: S101  # started before
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]

    def worker(self) -> int:
        """Pid of the server process."""
        assert self.process is not None  # noqa: S101  # started before
        return int(psutil.Process(self.process.pid).children()[0].pid)


def main() -> None:
    """Run the requested cells, and print them as a table."""
    kept = set(sys.argv[1:])
    say(f"{machine()}.\n")
    columns = (
        "signal, to, while, back by, able to draw after s, last job ended after s, accepted, lost, "
        "most attempts of one, answers to those who waited, processes left over"
    ).split(", ")
    say(f"| {' | '.join(columns)} |")
    say(f"|{' --- |' * len(columns)}")
    lost = 0
    for load, target, number in itertools.product(LOADS, TARGETS, SIGNALS):
        names = {load, target, number.name.removeprefix("SIG")}
        if any(word not in names for word in kept):
            continue
        with tempfile.TemporaryDirectory() as folder:
            cell = tried(Cell(number, target, load), SimulatedServer(Path(folder)))
        lost += cell.lost + cell.left_over
        say(cell.row())
    if lost:
        raise SystemExit(1)


def tried(cell: Cell, server: SimulatedServer) -> Cell:
    """Start a server, create the load, send the signal, and wait for the outcome."""
    server.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client:
            until(lambda: status_of(client, "/readyz") == 200)
            with ThreadPoolExecutor(WAITING) as pool:
                ids, waiting = put_to_work(cell, client, pool)
                strike(cell, server, client)
                until(lambda: all(state_of(client, job_id) in ("done", "failed") for job_id in ids))
                cell.finished += time.monotonic()
                cell.answers = ", ".join(sorted({answered(each) for each in waiting}))
            reported = [client.get(f"/jobs/{job_id}").json() for job_id in ids]
            stored = [
                client.get(each["receipt"]["path"]).status_code == 200 for each in reported if each.get("receipt")
            ]
    finally:
        assert server.process is not None  # noqa: S101  # started above
        server.process.terminate()
        server.process.wait(60)
    cell.accepted, cell.lost = len(ids), len(ids) - sum(stored)
    attempts = [each["attempts"] for each in reported]
    cell.attempts = str(max(attempts)) if attempts else "–"
    return cell


def put_to_work(
    cell: Cell, client: httpx.Client, pool: ThreadPoolExecutor
) -> tuple[list[str], list[Future[httpx.Response]]]:
    """Submit the jobs and the synchronous requests; in an idle cell wait until the jobs have ended."""
    number = JOBS if cell.load == "load" else 2
    ids = []
    for n in range(number):
        asked = {"prompt": f"a red circle on a blue background, {n}", "save_path": f"{n}.webp", **SMALL}
        answer = client.post(CREATE, json=asked, headers=ASYNC).raise_for_status()
        ids.append(str(answer.json()["id"]))
    if cell.load == "idle":
        until(lambda: all(state_of(client, job_id) == "done" for job_id in ids))
        return ids, []
    url = str(client.base_url.join(CREATE))
    query = {"prompt": "a green star", **SMALL, "num_inference_steps": 20}
    waiting = [pool.submit(httpx.get, url, params={**query, "seed": n}, timeout=120) for n in range(WAITING)]
    until(lambda: any(client.get(f"/jobs/{job_id}").json()["step"] > 2 for job_id in ids))
    return ids, waiting


def strike(cell: Cell, server: SimulatedServer, client: httpx.Client) -> None:
    """Send the signal, start the server again if no watchdog does, and wait until it is ready."""
    assert server.process is not None  # noqa: S101  # started before
    first, before = server.worker(), server.pids
    targets = {"worker": [first], "watchdog": [server.process.pid], "tree": before}[cell.target]
    at = time.monotonic()
    cell.finished = -at
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, cell.number)
    until(lambda: not alive(first))
    cell.by = "its watchdog"
    if cell.target != "worker":
        cell.by = f"a start (it ended with {server.process.wait(60)})"
        until(lambda: not any(map(alive, before)))
        server.start()
    until(lambda: status_of(client, "/readyz") == 200)
    cell.recovered = time.monotonic() - at
    cell.left_over = sum(alive(pid) for pid in before if pid != server.process.pid)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def answered(waiting: Future[httpx.Response]) -> str:
    """The outcome of a synchronous request."""
    try:
        return str(waiting.result().status_code)
    except httpx.TransportError:
        return "broken off"


def state_of(client: httpx.Client, job_id: str) -> str:
    """A job's state; while the server does not respond, that of a waiting job."""
    try:
        return str(client.get(f"/jobs/{job_id}").json()["state"])
    except httpx.TransportError:
        return "queued"


def status_of(client: httpx.Client, path: str) -> int:
    """Status code of a response, 0 for none."""
    try:
        return client.get(path, timeout=5).status_code
    except httpx.TransportError:
        return 0


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


if __name__ == "__main__":
    main()
