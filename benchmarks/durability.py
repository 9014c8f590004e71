"""Kills, suspends and starves a real server that has accepted jobs, and prints what happened to them.

    python benchmarks/durability.py

Needs Linux (it finds the watchdog's child in /proc). As root it gives the job store a real disk of 3 MB, otherwise a
quota.
"""

from __future__ import annotations

import io
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
JOBS = 10
SMALL: dict[str, Any] = {"width": 128, "height": 128, "num_inference_steps": 8}


def main() -> None:
    """Measure, and print a table."""
    rows: list[tuple[str, str]] = []
    for measure in (killed, hanging, full):
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), rows)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")  # noqa: T201  # its output
    print("| what | measured |\n| --- | --- |")  # noqa: T201  # its output
    for what, measured in rows:
        print(f"| {what} | {measured} |")  # noqa: T201  # its output


def killed(folder: Path, rows: list[tuple[str, str]]) -> None:
    """SIGKILL to the server process while ten accepted jobs are unfinished."""
    with server(folder) as (watchdog, client):
        ids = [accept(client, f"a red circle on a blue background, {n}", save_path=f"{n}.webp") for n in range(JOBS)]
        until(lambda: any(job(client, job_id)["step"] > 2 for job_id in ids))
        begun = sum(job(client, job_id)["state"] == "running" for job_id in ids)
        first, killed_at = child_of(watchdog), time.perf_counter()
        os.kill(first, signal.SIGKILL)
        until(lambda: asked(client, "/healthz") == 200 and child_of(watchdog) != first)
        answering = time.perf_counter() - killed_at
        until(lambda: asked(client, "/readyz") == 200)
        drawing = time.perf_counter() - killed_at
        until(lambda: all(job(client, job_id)["state"] in ("done", "failed") for job_id in ids))
        took = time.perf_counter() - killed_at
        ended = [job(client, job_id) for job_id in ids]
        stored = len(list((folder / "bucket" / "objects").rglob("*.webp")))
        again = [client.get(CREATE, params={"prompt": "x", "save_path": f"{n}.webp"}).json() for n in range(JOBS)]
    done = sum(reported["state"] == "done" for reported in ended)
    rows += [
        (f"{JOBS} accepted jobs, kill -9 with {begun} on the device: done / objects stored", f"{done} / {stored}"),
        ("answered from the bucket when asked again", f"{sum(answer['cached'] for answer in again)}"),
        ("kill to /healthz answering again", f"{answering:.1f} s"),
        ("kill to able to draw", f"{drawing:.1f} s"),
        ("kill to the last of them done", f"{took:.1f} s"),
        ("attempts per job", ", ".join(str(reported["attempts"]) for reported in ended)),
    ]


def hanging(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Suspend a server in the middle of an image, with WATCHDOG_TIMEOUT=5."""
    with server(folder, WATCHDOG_TIMEOUT="5") as (watchdog, client):
        job_id = accept(client, "a red circle on a blue background", num_inference_steps=100)
        until(lambda: job(client, job_id)["step"] > 2)
        first, stopped_at = child_of(watchdog), time.perf_counter()
        os.kill(first, signal.SIGSTOP)
        until(lambda: child_of(watchdog) != first)
        noticed = time.perf_counter() - stopped_at
        until(lambda: job(client, job_id)["state"] in ("done", "failed"))
        took, state = time.perf_counter() - stopped_at, job(client, job_id)["state"]
        status = client.get(CREATE, params={"prompt": "a green star", **SMALL}).status_code
    rows += [
        ("stopped amid a job, WATCHDOG_TIMEOUT=5: replaced after", f"{noticed:.1f} s"),
        ("the job it had in hand, and after how long", f"{state}, {took:.1f} s"),
        ("the next request", f"{status}"),
    ]


def full(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Submit jobs with images of 300 KB until the job store's disk is full."""
    data = folder / "data"
    data.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(data)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0  # noqa: S603  # written above
    quota = {} if mounted else {"JOB_STORE_BYTES": "3145728"}
    try:
        with server(folder, JOBS_CONCURRENCY="1", **quota) as (_, client):
            answers = []
            for number in range(16):
                picture = noise(number)
                fields = {"prompt": f"a red circle, {number}", "strength": "1", "num_inference_steps": "12"}
                files = {"image_file": ("a.png", picture, "image/png")}
                path = "/style_transfer_bytes_and_upload_image"
                answers.append(client.post(path, data=fields, files=files, headers=ASYNC))
            accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
            refused = next(answer for answer in answers if answer.status_code != 202)
            kinds = {answer.json()["type"].rsplit(":", 1)[1] for answer in answers if answer.status_code != 202}
            listed = len(client.get("/jobs").json()["jobs"])
            until(lambda: all(job(client, job_id)["state"] in ("done", "failed") for job_id in accepted))
            done = sum(job(client, job_id)["state"] == "done" for job_id in accepted)
            later = client.post(path, data=fields, files=files, headers=ASYNC).status_code
    finally:
        if mounted:
            subprocess.run(["umount", str(data)], check=False)  # noqa: S603, S607  # the mount above
    where = "a disk of 3 MB" if mounted else "a quota of 3 MB"
    reported = f"{refused.status_code} {', '.join(sorted(kinds))}, Retry-After {refused.headers.get('retry-after')}"
    rows += [
        (
            f"16 jobs with 300 KB each, journal on {where}: accepted / refused",
            f"{len(accepted)} / {16 - len(accepted)}",
        ),
        ("the refusal", reported),
        ("jobs that exist / of the accepted ones done", f"{listed} / {done}"),
        ("one more when the queue has a place again", f"{later}"),
    ]


@contextmanager
def server(folder: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A ready server under its watchdog."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PYTHONPATH": str(ROOT), "PORT": str(port), "PATH": os.environ["PATH"]}
    environment |= {"MODELS": "embedded", "CPU_THREADS": "1"}
    serve = [sys.executable, "-m", "stable_diffusion_server", "serve"]
    with (folder / "log").open("wb") as log:
        watchdog = subprocess.Popen(  # noqa: S603  # our own server
            [sys.executable, "-m", "stable_diffusion_server.watchdog", "--", *serve],
            cwd=folder,
            env={**environment, **settings},
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            until(lambda: asked(client, "/readyz") == 200)
            yield watchdog, client
    finally:
        watchdog.terminate()
        watchdog.wait(60)


def accept(client: httpx.Client, prompt: str, **more: Any) -> str:
    """Submit a job; returns its id."""
    answer = client.post(CREATE, json={"prompt": prompt, **SMALL, **more}, headers=ASYNC)
    answer.raise_for_status()
    return str(answer.json()["id"])


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job as JSON; a waiting job while the server does not respond."""
    try:
        reported: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
    except httpx.TransportError:
        return {"state": "queued", "step": 0}
    return reported


def asked(client: httpx.Client, path: str) -> int:
    """Status code of a response, 0 for none."""
    try:
        return client.get(path, timeout=5).status_code
    except httpx.TransportError:
        return 0


def child_of(process: subprocess.Popen[bytes]) -> int:
    """Pid of the server that a watchdog started, 0 while there is none."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else 0


def noise(number: int) -> bytes:
    """An incompressible image file."""
    target = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for ten minutes at most."""
    end = time.monotonic() + 600
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


if __name__ == "__main__":
    main()
