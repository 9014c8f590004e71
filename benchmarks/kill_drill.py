"""Kills a working server repeatedly, and reports what happened to every job it had accepted.

    python benchmarks/kill_drill.py [--kills 30] [--rounds 5] [--without-watchdog] [--painted]

Runs the real server with the embedded models (with --painted, fake images of a second each, which start at once), under
its watchdog or restarted by this program, as a restart loop would. Jobs are submitted all the time. Each kill is a
SIGKILL to the server process, at a random moment within two seconds after an image started. Exits with status 1 if a
job was lost or failed. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from kill_matrix import ASYNC, CREATE, SMALL, SimulatedServer, alive, status_of, until
from loopback import say
from watching import ROOT, machine

_WAITING = 12


@dataclass
class Load:
    """Submits jobs while fewer than a dozen wait, also while the server is down."""

    url: str
    accepted: list[str] = field(default_factory=list)
    refused: int = 0
    broken_off: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Submit until stopped."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            number = 0
            while not self.stopped.wait(0.05):
                number += 1
                asked = {"prompt": f"a red circle on a blue background, {number}", **SMALL}
                try:
                    if (
                        sum(job["state"] in ("queued", "running") for job in client.get("/jobs").json()["jobs"])
                        >= _WAITING
                    ):
                        continue
                    answer = client.post(CREATE, json=asked, headers=ASYNC)
                except (httpx.TransportError, KeyError, ValueError):
                    self.broken_off += 1
                    continue
                if answer.status_code == 202:
                    self.accepted.append(str(answer.json()["id"]))
                else:
                    self.refused += 1


@dataclass
class Drilled(SimulatedServer):
    """A server with or without a watchdog, with the embedded models or with fake images."""

    watched: bool = True
    painted: bool = False

    def start(self) -> None:
        """Start the server without waiting for it."""
        environment = {"PYTHONPATH": str(ROOT), "PORT": str(self.port), "PATH": os.environ["PATH"]}
        environment |= {"MODELS": "embedded", "OMP_NUM_THREADS": "1", "LOG_LEVEL": "error", "HOME": str(self.folder)}
        serve = [sys.executable, "-m", "stable_diffusion_server", "serve"]
        painted = [sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.1"]
        watchdog = [sys.executable, "-m", "stable_diffusion_server.watchdog", "--"] if self.watched else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603  # our own server
                [*watchdog, *(painted if self.painted else serve)],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def worker(self) -> int:
        """Pid of the server process."""
        assert self.process is not None  # noqa: S101  # started before
        return super().worker() if self.watched else self.process.pid


def main() -> None:
    """Run the requested rounds, and print each as a row of a table."""
    parser = argparse.ArgumentParser(description="Kills a working server again and again.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-watchdog", action="store_true")
    parser.add_argument("--painted", action="store_true")
    given = parser.parse_args()
    how = f"{'no watchdog' if given.without_watchdog else 'under the watchdog'}{', painted' * given.painted}"
    say(f"{machine()}; {how}.\n")
    columns = [
        *("round", "kills", "with a picture on the device", "accepted", "done", "failed", "lost"),
        "most attempts of one",
    ]
    say(f"| {' | '.join(columns)} |")
    say(f"|{' --- |' * len(columns)}")
    bad = 0
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            server = Drilled(Path(folder), watched=not given.without_watchdog, painted=given.painted)
            bad += drilled(number + 1, server, given.kills)
    raise SystemExit(bool(bad))


def drilled(number: int, server: Drilled, kills: int) -> int:
    """Run one round; returns the number of failed or lost jobs."""
    chance, hits = random.Random(number), 0  # noqa: S311  # moments for kills
    server.start()
    load = Load(f"http://127.0.0.1:{server.port}")
    thread = threading.Thread(target=load.run)
    try:
        with httpx.Client(base_url=load.url, timeout=60) as client:
            until(lambda: status_of(client, "/readyz") == 200)
            thread.start()
            for _ in range(kills):
                until(lambda: bool(on_device(server)))
                time.sleep(chance.uniform(0, 2))
                hits += bool(on_device(server))
                killed(server)
                until(lambda: status_of(client, "/readyz") == 200)
            load.stopped.set()
            thread.join()
            ended = {job_id: state_at_the_end(client, job_id) for job_id in load.accepted}
            stored = [client.get(each["receipt"]["path"]).status_code for each in ended.values() if each.get("receipt")]
    finally:
        load.stopped.set()
        assert server.process is not None  # noqa: S101  # started above
        server.process.terminate()
        server.process.wait(120)
    states = [str(each.get("state", "lost")) for each in ended.values()]
    done = sum(status == 200 for status in stored)
    failed, lost = states.count("failed"), len(states) - states.count("failed") - done
    most = max((int(each.get("attempts", 0)) for each in ended.values()), default=0)
    say(f"| {number} | {kills} | {hits} | {len(states)} | {done} | {failed} | {lost} | {most} |")
    return failed + lost


def killed(server: Drilled) -> None:
    """SIGKILL to the server; without a watchdog, start it again."""
    victim = server.worker()
    os.kill(victim, signal.SIGKILL)
    if not server.watched:
        assert server.process is not None  # noqa: S101  # started before
        server.process.wait(60)
        server.start()
        return
    until(lambda: not alive(victim))
    with suppress(psutil.NoSuchProcess, IndexError):
        until(lambda: server.worker() != victim)


def on_device(server: Drilled) -> list[str]:
    """The requests on the device, from the file that the server writes."""
    try:
        reported: list[str] = json.loads((server.folder / "data" / "device.json").read_bytes())["on_device"]
    except (OSError, ValueError, KeyError):
        return []
    return reported


def state_at_the_end(client: httpx.Client, job_id: str) -> dict[str, object]:
    """The job as JSON after it has ended; its state is `lost` if the server does not know it."""
    reported: dict[str, object] = {}

    def over() -> bool:
        answer = client.get(f"/jobs/{job_id}")
        reported.clear()
        reported.update(answer.json() if answer.status_code == 200 else {"state": "lost"})
        return reported["state"] not in ("queued", "running")

    until(over)
    return reported


if __name__ == "__main__":
    main()
