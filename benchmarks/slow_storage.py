"""Measures how a storage that takes 30 seconds per response affects the device: it should not affect it.

    python -m benchmarks.slow_storage [orders]

Needs dev-requirements.txt for the S3 server on loopback. A proxy in front of it passes everything on at once, or after
a pause. The same server generates the same number of images in each phase, for eight clients at a time. A fake device
sleeps a quarter of a second per step, so that other load on the machine does not blur the figures.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import boto3
import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray

from benchmarks.cached_hits import KEYS, ROOT, free_port, wait_for
from stable_diffusion_server.app import create_app
from stable_diffusion_server.engine import DenoiserCapabilities
from stable_diffusion_server.settings import read_settings
from stable_diffusion_server.types import DiffusionRequest

ORDERS = int(sys.argv[1]) if len(sys.argv) > 1 else 60
STEPS, STEP_SECONDS = 4, 0.25
CLIENTS, PAUSE = 8, 30.0
TIMEOUT = 10.0


@dataclass(slots=True)
class Sleep:
    """A request in progress."""

    job: DiffusionRequest
    index: int = 0

    @property
    def shape(self) -> tuple[object, ...]:
        """Requests of equal shape share a step."""
        return self.job.shape

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return STEPS

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.index >= STEPS


@dataclass(frozen=True, slots=True)
class Grey:
    """The finished image."""

    pixels: NDArray[np.uint8]
    redecoded: bool = False


class Sleeper(DenoiserCapabilities):
    """A fake device: every step takes the same time, whatever else the machine does."""

    def count_tokens(self, model: str, prompt: str) -> int:
        """A small constant."""
        return 5

    def prepare(self, job: DiffusionRequest) -> Sleep:
        """Nothing to prepare."""
        return Sleep(job)

    def step(self, states: Sequence[Sleep]) -> None:
        """One step for all states."""
        time.sleep(STEP_SECONDS)
        for state in states:
            state.index += 1

    def finish(self, state: Sleep) -> Grey:
        """A grey image."""
        return Grey(np.full((state.job.height, state.job.width, 3), state.job.seed % 200 + 20, np.uint8))


def serve() -> None:
    """Run the server on the fake device, as a separate process."""
    settings = read_settings()
    uvicorn.run(create_app(settings, load=lambda _: Sleeper()), port=settings.port, log_level="error")


class Slow:
    """A proxy that delays the storage's responses by `pause` seconds."""

    def __init__(self, port: int) -> None:
        self.pause = 0.0
        self._port = port

    async def serve(self, port: int) -> None:
        """Forward every connection."""
        await asyncio.start_server(self._pass_on, "127.0.0.1", port)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_storage, to_storage = await asyncio.open_connection("127.0.0.1", self._port)
        with suppress(asyncio.CancelledError):  # the benchmark has ended
            await asyncio.gather(pump(reader, to_storage, lambda: 0.0), pump(from_storage, writer, lambda: self.pause))


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, pause: Callable[[], float]) -> None:
    """Forward everything from one side to the other, each chunk after the pause."""
    try:
        while piece := await source.read(65536):
            await asyncio.sleep(pause())
            target.write(piece)
            await target.drain()
    except OSError:
        pass
    finally:
        target.close()


async def main() -> None:
    """Start everything in an empty folder, measure fast, slow and fast again, print, stop it."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            storage, between, port = free_port(), free_port(), free_port()
            start(started, folder, storage, between, port)
            slow = Slow(storage)
            await slow.serve(between)
            await asyncio.to_thread(wait_for, port, "/readyz")
            await phase(port, "warming up", 8)
            print(f"{platform.machine()}, {os.cpu_count()} cores, {ORDERS} orders of 128 × 128 a phase\n")  # noqa: T201  # its output
            print("| storage | pictures a minute | and after the first answers | seconds on the device each "  # noqa: T201  # its output
                  "| median answer, s | kept here |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
            for name, pause in (("well", 0.0), (f"{PAUSE:g} s slow", PAUSE), ("well again", 0.0)):
                slow.pause = pause
                if name == "well again":
                    await settled(port)
                print(await phase(port, name, ORDERS))  # noqa: T201  # its output
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)


def start(started: list[subprocess.Popen[bytes]], folder: str, storage: int, between: int, port: int) -> None:
    """The S3 server with a bucket, and the server that reaches it through the proxy."""
    kept = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "PATH": os.environ["PATH"], "HOME": folder}
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    s3 = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(storage)]
    started.append(subprocess.Popen(s3, env=kept, **quiet))  # noqa: S603  # our own
    wait_for(storage, "/moto-api/")
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{storage}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket="pictures")
    environment = {
        **kept,
        **KEYS,
        "PORT": str(port),
        "LOG_LEVEL": "error",
        "STORAGE_PROVIDER": "r2",
        "BUCKET_NAME": "pictures",
        "R2_ENDPOINT_URL": f"http://127.0.0.1:{between}",
        "STORAGE_TIMEOUT": str(TIMEOUT),
    }
    serve = [sys.executable, "-c", "import slow_storage; slow_storage.serve()"]
    started.append(subprocess.Popen(serve, env=environment, **quiet))  # noqa: S603  # our own


async def phase(port: int, name: str, orders: int) -> str:
    """Generate that many different images; returns a row of the table."""
    numbers = iter(range(orders))
    ended: list[float] = []
    taken: list[float] = []
    busy: list[float] = []
    kept = 0
    before = time.perf_counter()

    async def client() -> None:
        nonlocal kept
        async with httpx.AsyncClient(timeout=180) as caller:
            for number in numbers:
                order = {"prompt": f"a red circle {name} {number}", "width": 128, "height": 128}
                asked = time.perf_counter()
                answer = await caller.get(f"http://127.0.0.1:{port}/create_and_upload_image", params=order)
                answer.raise_for_status()
                receipt = answer.json()
                ended.append(time.perf_counter())
                taken.append(ended[-1] - asked)
                stages = receipt["timings"]
                busy.append(stages["prepare"] + stages["denoise"] + stages["decode"])
                kept += not receipt["stored"]

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    whole = 60 * orders / (max(ended) - before)
    first = sorted(ended)[CLIENTS - 1]
    after = 60 * (orders - CLIENTS) / (max(ended) - first) if orders > CLIENTS else 0.0
    figures = f"{whole:.0f} | {after:.0f} | {statistics.median(busy):.2f} | {statistics.median(taken):.2f} | {kept}"
    return f"| {name} | {figures} |"


async def settled(port: int) -> None:
    """Wait until no upload is pending."""
    async with httpx.AsyncClient() as caller:
        for _ in range(900):
            figures = (await caller.get(f"http://127.0.0.1:{port}/metrics")).text
            if "sds_spool_pictures 0.0" in figures:
                return
            await asyncio.sleep(0.2)
    raise SystemExit("the spool was not emptied")


if __name__ == "__main__":
    asyncio.run(main())
