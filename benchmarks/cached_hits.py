"""Measures cached responses, from the local bucket and from S3, against a bare FastAPI endpoint in the same run.

    python -m benchmarks.cached_hits [seconds]

Needs dev-requirements.txt for the S3 server on loopback. One minimal client requests all three in turn over eight
keep-alive connections, so other load and the client's own cost affect all of them alike. If other processes take most
of the machine, the CPU time per response is the steadier figure: for a server with a core of its own, the ratio of the
rates equals the ratio of these times.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import boto3
import httpx
import psutil

from benchmarks.http_client import Connection
from benchmarks.loopback import free_port, say
from benchmarks.tables import Result, machine, ratio, ratios, table

ROOT = Path(__file__).resolve().parent.parent
SECONDS, CONNECTIONS, ROUNDS = 2.0, 8, 9
BARE_NAME = "bare FastAPI"
QUERY = f"/create_and_upload_image?prompt={quote('a red circle')}&save_path=a.webp&width=64&height=64"
BARE = """
import uvicorn, sys
from fastapi import FastAPI
app = FastAPI()
@app.get("/create_and_upload_image")
async def answer(prompt: str, save_path: str, width: int, height: int) -> dict[str, object]:
    return {"path": save_path, "cached": True, "width": width, "height": height}
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
"""
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "sesame-open"}


def main() -> None:
    """Measure and print."""
    say("\n".join([machine(), "", *measure(ROUNDS, float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS).lines]))


def measure(rounds: int, seconds: float = SECONDS) -> Result:
    """Start everything in an empty folder, measure in turn, stop it."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ports = start_all(Path(folder), started)
            rates: dict[str, list[float]] = {name: [] for name in ports}
            costs: dict[str, list[float]] = {name: [] for name in ports}
            # The storage server was started first.
            servers = dict(zip(ports, (psutil.Process(process.pid) for process in started[1:]), strict=True))
            for _ in range(rounds):
                for name, port in ports.items():
                    before = processor_seconds(servers[name])
                    rates[name].append(asyncio.run(rate_of(port, seconds)))
                    spent = processor_seconds(servers[name]) - before
                    costs[name].append(1000 * spent / (rates[name][-1] * seconds))
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)
    rows = [
        (
            name,
            f"{statistics.median(values):.0f}",
            ratios(values, rates[BARE_NAME]),
            f"{statistics.median(costs[name]):.2f}",
            ratios(costs[BARE_NAME], costs[name]),
        )
        for name, values in rates.items()
    ]
    head = (
        "cached answers",
        "requests a second",
        "ratio to bare, by round",
        "processor ms an answer",
        "ratio of these",
    )
    lines = [f"{rounds} × {seconds:g} s over {CONNECTIONS} connections.", "", *table(head, rows), ""]
    return Result(lines, {"hits, of a bare endpoint's": ratio(rates["local"], rates[BARE_NAME])})


def processor_seconds(process: psutil.Process) -> float:
    """CPU seconds that a process has used so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def start_all(folder: Path, started: list[subprocess.Popen[bytes]]) -> dict[str, int]:
    """Start the bare endpoint and the server over two buckets, each with its image stored; returns names and ports."""
    ports = {name: free_port() for name in (BARE_NAME, "local", "S3")}
    storage = free_port()

    def start(*command: str, **environment: str) -> None:
        kept = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(folder)}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        line = [sys.executable, *command]
        started.append(subprocess.Popen(line, cwd=folder, env={**kept, **environment}, **quiet))  # noqa: S603  # our own

    start("-m", "moto.server", "-H", "127.0.0.1", "-p", str(storage))
    start("-c", BARE, str(ports[BARE_NAME]))
    wait_for(storage, "/moto-api/")
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{storage}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket="pictures")
    serve = ("-m", "stable_diffusion_server", "serve")
    r2 = {"STORAGE_PROVIDER": "r2", "BUCKET_NAME": "pictures", "R2_ENDPOINT_URL": f"http://127.0.0.1:{storage}", **KEYS}
    start(*serve, PORT=str(ports["local"]), LOG_LEVEL="warning")
    start(*serve, PORT=str(ports["S3"]), LOG_LEVEL="warning", DATA_DIR="data-s3", **r2)
    for name in ("local", "S3"):
        wait_for(ports[name], "/readyz")
        httpx.get(f"http://127.0.0.1:{ports[name]}{QUERY}", timeout=120).raise_for_status()
    return ports


async def rate_of(port: int, seconds: float) -> float:
    """Responses per second over several concurrent connections."""
    end = time.perf_counter() + seconds
    counts = await asyncio.gather(*(asked(port, end) for _ in range(CONNECTIONS)))
    return sum(counts) / seconds


async def asked(port: int, end: float) -> int:
    """Number of responses on one connection until `end`."""
    line, count = await Connection.open(port), 0
    while time.perf_counter() < end:
        await line.ask(QUERY)
        count += 1
    line.close()
    return count


def wait_for(port: int, path: str) -> None:
    """Wait for status 200, for a minute or two at most."""
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{path} did not answer")


if __name__ == "__main__":
    main()
