"""Sends mixed requests, synchronous and as jobs, ends them in every way, and checks each image against its request.

    python benchmarks/mixed_jobs.py [requests] [at once]

A separate server process generates fake images, so every expected pixel is known: the colour comes from the prompt, the
shade from the seed. This measures everything but the models; `soak.py` does the same with trained weights.
"""

from __future__ import annotations

import asyncio
import io
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CREATE = "/create_and_upload_image"
REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
AT_ONCE = int(sys.argv[2]) if len(sys.argv) > 2 else 32
EQUALS = 100
COLOURS = {"red": (215, 40, 40), "green": (50, 160, 60), "blue": (45, 85, 210), "yellow": (245, 215, 50)}
WAYS = ("waits", "job", "follows its job", "hangs up", "cancels its job", "deadline")
SHARES = (40, 25, 10, 10, 10, 5)


@dataclass(frozen=True)
class Asked:
    """One request, and what its client does with it."""

    number: int
    way: str
    colour: str
    seed: int
    width: int
    height: int
    steps: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The request as JSON."""
        size = {"width": self.width, "height": self.height, "num_inference_steps": self.steps}
        return {"prompt": f"a {self.colour} square", "seed": self.seed, "save_path": f"{self.number}.png", **size}

    def is_own(self, file: bytes) -> bool:
        """Whether an image belongs to this request, to the pixel."""
        pixels = np.asarray(Image.open(io.BytesIO(file)))
        shade = np.array(COLOURS[self.colour], np.int16) - self.seed % 16
        return pixels.shape == (self.height, self.width, 3) and bool((pixels == shade.clip(0, 255)).all())


def main() -> None:
    """Start a server in an empty folder, send, check, print, stop it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(  # noqa: S603  # our own server
                [sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.02"],
                cwd=folder,
                env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "PORT": str(port), "QUEUE_LIMIT": "128"},
                stdout=log,
                stderr=log,
            )
        try:
            asyncio.run(measure(f"http://127.0.0.1:{port}", psutil.Process(server.pid)))
        finally:
            server.terminate()
            server.wait(60)


async def measure(url: str, process: psutil.Process) -> None:
    """Run the whole measurement."""
    chance = random.Random(5)  # noqa: S311  # no secret
    orders = [order(chance, number) for number in range(REQUESTS)]
    limits = httpx.Limits(max_connections=2 * AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await until(lambda: asked(client, "/readyz"))
        equal, memory = await equal_orders(client), [process.memory_info().rss / 1e6]
        outcomes: Counter[str] = Counter()
        began, fifth = time.perf_counter(), len(orders) // 5 or 1
        for start in range(0, len(orders), fifth):
            places = asyncio.Semaphore(AT_ONCE)
            outcomes.update(
                await asyncio.gather(*(one(client, places, each) for each in orders[start : start + fifth]))
            )
            memory.append(process.memory_info().rss / 1e6)
        seconds = time.perf_counter() - began
        await until(lambda: idle(client))
        ended = {each: sum(part.way == each for part in orders) for each in WAYS}
        stored = await asyncio.gather(*(is_stored(client, each) for each in orders))
        left = sum(there for there, each in zip(stored, orders, strict=True) if each.way in WAYS[3:])
    load = f"load {os.getloadavg()[0]:.0f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {load}\n")  # noqa: T201  # its output
    rows = [
        (f"requests, {AT_ONCE} at once", ", ".join(f"{number} {way}" for way, number in ended.items())),
        ("what came of them", ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items()))),
        ("pictures that were another order's", str(outcomes["cross-talk"])),
        ("of those ended on the way: stored all the same, since the end came too late", str(left)),
        ("all done after", f"{seconds:.0f} s"),
        ("memory of the server in MB before, and after each fifth", ", ".join(f"{value:.0f}" for value in memory)),
        (f"generations for {EQUALS} equal orders at once, half of them jobs", f"{equal:.0f}"),
    ]
    print("| what | measured |\n| --- | --- |")  # noqa: T201  # its output
    for what, measured in rows:
        print(f"| {what} | {measured} |")  # noqa: T201  # its output
    if outcomes["cross-talk"] or equal != 1:
        raise SystemExit(1)


def order(chance: random.Random, number: int) -> Asked:
    """A random request: size, seed, colour and client behaviour."""
    (way,) = chance.choices(WAYS, SHARES)
    side = (64, 80, 96, 128, 160, 256)
    size = chance.choice(side), chance.choice(side)
    return Asked(number, way, chance.choice(list(COLOURS)), chance.randrange(2**32), *size, chance.randrange(2, 12))


async def one(client: httpx.AsyncClient, places: asyncio.Semaphore, each: Asked) -> str:
    """The outcome of one request."""
    async with places:
        if each.way in ("job", "follows its job", "cancels its job"):
            return await by_job(client, each)
        patience = 0.03 * (each.number % 8 + 1)
        parameters = {**each.parameters, **({"timeout": patience} if each.way == "deadline" else {})}
        try:
            seconds = patience if each.way == "hangs up" else 120
            answer = await client.post(CREATE, json=parameters, timeout=seconds)
        except httpx.TimeoutException:
            return "hung up"
        if answer.status_code == 504:
            return "deadline passed"
        return await checked(client, each, answer.raise_for_status().json())


async def by_job(client: httpx.AsyncClient, each: Asked) -> str:
    """The outcome of a request submitted as a job."""
    answer = await client.post(CREATE, json=each.parameters, headers={"Prefer": "respond-async"})
    path = f"/jobs/{answer.raise_for_status().json()['id']}"
    if each.way == "cancels its job":
        await asyncio.sleep(0.02 * (each.number % 8))
        reported = (await client.delete(path)).raise_for_status().json()
    elif each.way == "follows its job":
        events = (await client.get(f"{path}/events")).raise_for_status().text
        assert "event: done" in events, events[-300:]  # noqa: S101  # a benchmark ends where it is wrong
        reported = (await client.get(path)).json()
    else:
        while (reported := (await client.get(path)).json())["state"] in ("queued", "running"):  # noqa: ASYNC110  # polls
            await asyncio.sleep(0.1)
    return await checked(client, each, reported["receipt"]) if reported["state"] == "done" else str(reported["state"])


async def checked(client: httpx.AsyncClient, each: Asked, receipt: dict[str, Any]) -> str:
    """Whether the image at a receipt's path belongs to the request."""
    file = (await client.get(httpx.URL(receipt["path"]).path)).raise_for_status().content
    return "own picture" if each.is_own(file) and receipt["seed"] == each.seed else "cross-talk"


async def equal_orders(client: httpx.AsyncClient) -> float:
    """Number of images generated for many concurrent equal requests, half of them as jobs."""
    before = await figure(client, 'sds_jobs_total{outcome="done"}')
    parameters = {"prompt": "a red square", "width": 64, "height": 64, "num_inference_steps": 50}
    headers = [{"Prefer": "respond-async, wait=60"} if number % 2 else {} for number in range(EQUALS)]
    asked_ = [client.post(CREATE, json=parameters, headers=each) for each in headers]
    keys = {answer.raise_for_status().json()["key"] for answer in await asyncio.gather(*asked_)}
    assert len(keys) == 1, keys  # noqa: S101  # a benchmark ends where it is wrong
    return await figure(client, 'sds_jobs_total{outcome="done"}') - before


async def is_stored(client: httpx.AsyncClient, each: Asked) -> bool:
    """Whether an object with the request's name exists."""
    return (await client.head(f"/files/static/uploads/{each.number}.png")).status_code == 200


async def figure(client: httpx.AsyncClient, name: str) -> float:
    """The value of a metric."""
    lines = (await client.get("/metrics")).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


async def idle(client: httpx.AsyncClient) -> bool:
    """Whether no image waits or runs."""
    return await figure(client, "sds_queue_waiting") + await figure(client, "sds_queue_running") == 0


async def asked(client: httpx.AsyncClient, path: str) -> bool:
    """Whether a path returns a success status."""
    try:
        return (await client.get(path)).status_code == 200
    except httpx.TransportError:
        return False


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the condition holds, for two minutes at most."""
    async with asyncio.timeout(120):
        while not await condition():  # noqa: ASYNC110  # polls a server
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
