"""Compares two replicas under Ray Serve with one process: correct images, a killed replica, overload, shutdown.

Run: `python -m benchmarks.ray_serve --python PATH`, where PATH is a Python with the packages of
deploy/ray-requirements.txt and requirements.txt. The replicas share an S3 server on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.loopback import free_port, say, wait_for

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from storage_servers import SECRET, StorageServer, make_s3_bucket, s3_client, start_s3  # noqa: E402  # tests' own S3

CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
SHAPES, COLOURS = ("circle", "square", "triangle", "star", "heart"), ("red", "blue", "green", "yellow", "purple")
# Concurrent different images, and the steps of each. The first is half encoding, storing and HTTP; the second is
# denoising.
LOADS = {"40 at once, 256 × 256, 4 steps": (40, 4), "24 at once, 256 × 256, 30 steps": (24, 30)}
ROUNDS, DISTINCT, EQUAL, CROWD, QUEUE = 3, 40, 20, 300, 64
_SAME_DB = 45.0


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter that has Ray Serve")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--part", choices=("drawing", "scaling"), help="one of the two alone")
    given = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    say(f"{machine}, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as folder:
        store = start_s3(Path(folder))
        try:
            if given.part != "scaling":
                figures(Path(folder), store, given.python, given.rounds)
            if given.part != "drawing":
                scaling(Path(folder), store, given.python)
        finally:
            store.stop()


def figures(folder: Path, store: StorageServer, python: str, rounds: int) -> None:
    """Send one process and two replicas the same requests, then test what only replicas do.

    Every process has one engine thread.
    """
    one = [sys.executable, "-m", "stable_diffusion_server", "serve"]
    ray = [python, "-m", "deploy.ray_serve", "--replicas", "2", "--cpus", "1"]
    middles: dict[str, list[float]] = {load: [] for load in LOADS}
    pictures: list[list[bytes]] = []
    say("| what draws | what is asked | pictures a second, median (least to most) | of one process |")
    say("| --- | --- | --- | --- |")
    for name, command in (("one process", one), ("Ray Serve, 2 replicas", ray)):
        with server(folder / name.replace(" ", "-"), store, command, ENGINE_WORKERS="1") as (process, client, bucket):
            burst(client, "warm up", 8, 0)
            for load, (number, steps) in LOADS.items():
                seen = [burst(client, f"{steps} steps {turn}", number, 0, steps)[0] for turn in range(rounds)]
                middles[load].append(statistics.median(seen))
                reported = f"{middles[load][-1]:.2f} ({min(seen):.2f} to {max(seen):.2f})"
                say(f"| {name} | {load} | {reported} | {middles[load][-1] / middles[load][0]:.2f} |")
            pictures.append(fetched(client, store, bucket))
            rows = [("`/healthz` a second over 8 connections", f"{asyncio.run(routes(str(client.base_url))):.0f}")]
            if command is ray:
                least = min(alike(a, b) for a, b in zip(*pictures, strict=True))
                rows.append((f"least alike of {DISTINCT} pictures to those of one process", least_told(least)))
                for part in (together, killed, overloaded):
                    tell(rows)
                    rows = []
                    part(process, client, store, bucket, rows)
            tell(rows)


def together(
    process: subprocess.Popen[bytes],
    client: httpx.Client,
    store: StorageServer,
    bucket: str,
    rows: list[tuple[str, str]],
) -> None:
    """40 distinct and 20 equal concurrent requests."""
    before = objects(store, bucket)
    _, answers = burst(client, "together", DISTINCT, EQUAL)
    new = objects(store, bucket) - before
    equal = {answer.json()["path"] for answer in answers[DISTINCT:]}
    statuses = Counter(answer.status_code for answer in answers)
    reported = Counter(
        "cached" if (receipt := answer.json())["cached"] else "coalesced" if receipt["coalesced"] else "drawn"
        for answer in answers[DISTINCT:]
    )
    wrong = sum(not coloured_right(client, answer, index) for index, answer in enumerate(answers[:DISTINCT]))
    rows += [
        (f"{DISTINCT} distinct and {EQUAL} equal orders at once: statuses", shown(statuses)),
        ("objects in the bucket from them; addresses of the equal ones", f"{len(new)}; {len(equal)}"),
        ("the equal ones were", shown(reported)),
        ("pictures of another colour than ordered", f"{wrong}"),
    ]


def killed(
    process: subprocess.Popen[bytes],
    client: httpx.Client,
    store: StorageServer,
    bucket: str,
    rows: list[tuple[str, str]],
) -> None:
    """SIGKILL to one replica with accepted jobs, while requests continue."""
    before = objects(store, bucket)
    ids = [accept(client, f"{prompt(n)}, kill {n}", num_inference_steps=20) for n in range(30)]
    until(lambda: any(job(client, job_id).get("step", 0) > 2 for job_id in ids))
    victim, killed_at = replicas(process)[0], time.perf_counter()
    victim.kill()
    statuses: Counter[str] = Counter()
    back = 0.0
    left = set(ids)
    number = 0
    while left or not back:
        number += 1
        answer = client.post(CREATE, data={"prompt": f"{prompt(number)}, going on {number}", **SMALL})
        wait = answer.headers.get("retry-after")
        statuses[f"{answer.status_code}{' with Retry-After' if wait else ''}"] += 1
        for job_id in tuple(left):
            reported = client.get(f"/jobs/{job_id}")
            if reported.status_code == 200 and reported.json()["state"] in ("done", "failed"):
                left.discard(job_id)
        if not back and all(client.get(f"/jobs/{job_id}").status_code == 200 for job_id in ids):
            back = time.perf_counter() - killed_at
        if time.perf_counter() - killed_at > 240:
            break
        time.sleep(0.2)
    took = time.perf_counter() - killed_at
    states = Counter(job(client, job_id)["state"] for job_id in ids)
    paths = {job(client, job_id)["receipt"]["key"] for job_id in ids if job(client, job_id)["state"] == "done"}
    there = len(paths & (objects(store, bucket) - before))
    rows += [
        ("30 accepted jobs, kill -9 of one of the 2 replicas: states in the end; objects", f"{shown(states)}; {there}"),
        ("kill to every job being reported again (models loaded, folder taken up)", f"{back:.1f} s"),
        ("kill to the last of them done", f"{took:.1f} s"),
        ("requests meanwhile, one at a time, not repeated", shown(statuses)),
    ]


def overloaded(
    process: subprocess.Popen[bytes],
    client: httpx.Client,
    store: StorageServer,
    bucket: str,
    rows: list[tuple[str, str]],
) -> None:
    """Far more concurrent requests than two queues hold."""
    answers = asyncio.run(ordered(str(client.base_url), [order(f"overload {n}", n) for n in range(CROWD)]))
    refused = [answer for answer in answers if answer.status_code != 200]
    waits = Counter(answer.headers.get("retry-after", "none") for answer in refused)
    kinds = Counter(f"{answer.status_code} {answer.headers.get('content-type', '')}" for answer in refused)
    late = max((answer.elapsed.total_seconds() for answer in refused), default=0.0)
    rows += [
        (
            f"{CROWD} orders at once, 2 × {QUEUE} places: drawn / refused",
            f"{len(answers) - len(refused)} / {len(refused)}",
        ),
        ("the refusals", shown(kinds)),
        ("their Retry-After; the slowest of them", f"{shown(waits)}; {late:.2f} s"),
    ]


def scaling(folder: Path, store: StorageServer, python: str) -> None:
    """Scale from one replica to two by waiting jobs, back to one, and stop by a signal with unfinished jobs."""
    command = [python, "-m", "deploy.ray_serve", *"--replicas 1 --most 2 --cpus 1 --pictures-each 8".split()]
    command += "--up-seconds 2 --down-seconds 5".split()
    rows: list[tuple[str, str]] = []
    with server(folder / "scaled", store, command) as (process, client, bucket):
        started = time.perf_counter()
        ids = [accept(client, f"{prompt(n)}, scaled {n}", num_inference_steps=60) for n in range(60)]
        until(lambda: len(replicas(process)) == 2)
        rows.append(
            ("60 jobs accepted by one replica to the second one's process", f"{time.perf_counter() - started:.1f} s")
        )
        until(lambda: all(job(client, job_id).get("state") == "done" for job_id in ids))
        idle = time.perf_counter()
        until(lambda: len(replicas(process)) == 1)
        rows.append(("the last job done to one replica again", f"{time.perf_counter() - idle:.1f} s"))
        keys = [f"drained/{n}.webp" for n in range(20)]
        for number, key in enumerate(keys):
            accept(client, f"{prompt(number)}, drained", num_inference_steps=20, save_path=key)
        stopped = time.perf_counter()
        process.terminate()
        process.wait(300)
        kept = sum(f"static/uploads/{key}" in objects(store, bucket) for key in keys)
        took = time.perf_counter() - stopped
        rows.append(
            ("20 jobs accepted, then SIGTERM at once: objects stored when it had ended", f"{kept}, {took:.1f} s")
        )
    tell(rows)


SMALL = {"width": 256, "height": 256}


def prompt(number: int) -> str:
    """One of a few objects, in a colour that the image can be checked for."""
    return f"a {COLOURS[number % len(COLOURS)]} {SHAPES[number // len(COLOURS) % len(SHAPES)]} on a white background"


def order(name: str, number: int, steps: int = 4) -> dict[str, Any]:
    """A unique request, by its seed."""
    seed = int.from_bytes(name.encode()[-6:], "big") % 2**32
    return {"prompt": prompt(number), "seed": seed, "num_inference_steps": steps, **SMALL}


def burst(
    client: httpx.Client, name: str, distinct: int, equal: int, steps: int = 4
) -> tuple[float, list[httpx.Response]]:
    """Images per second for that many concurrent requests, and their responses."""
    orders = [{**order(name, n, steps), "seed": 1000 * (hash_of(name) % 1000) + n} for n in range(distinct)]
    orders += [{**order(name, 0), "seed": 999_999_999 - hash_of(name) % 1000}] * equal
    started = time.perf_counter()
    answers = asyncio.run(ordered(str(client.base_url), orders))
    rate = len(orders) / (time.perf_counter() - started)
    if any(answer.status_code != 200 for answer in answers):
        raise SystemExit(shown(Counter(answer.status_code for answer in answers)))
    return rate, answers


def hash_of(name: str) -> int:
    """A number that depends only on the last word of a name, the turn, so that all servers get equal requests."""
    return sum(name.rpartition(" ")[2].encode())


async def ordered(base: str, orders: list[dict[str, Any]]) -> list[httpx.Response]:
    """The responses to concurrent requests."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=300, limits=limits) as client:
        return list(await asyncio.gather(*(client.post(CREATE, json=wanted) for wanted in orders)))


async def routes(base: str, seconds: float = 4.0) -> float:
    """Responses of `/healthz` per second over eight keep-alive connections: the cost of routing to a replica."""
    end = time.perf_counter() + seconds

    async def asking(client: httpx.AsyncClient) -> int:
        number = 0
        while time.perf_counter() < end:
            (await client.get("/healthz")).raise_for_status()
            number += 1
        return number

    async with httpx.AsyncClient(base_url=base) as client:
        return sum(await asyncio.gather(*(asking(client) for _ in range(8)))) / seconds


def fetched(client: httpx.Client, store: StorageServer, bucket: str) -> list[bytes]:
    """The image files of the first round's requests, which are the same for all servers."""
    _, answers = burst(client, "any 0", DISTINCT, 0)
    s3 = s3_client(store.url)
    return [s3.get_object(Bucket=bucket, Key=answer.json()["key"])["Body"].read() for answer in answers]


def coloured_right(client: httpx.Client, answer: httpx.Response, number: int) -> bool:
    """Whether the middle of an image has the requested colour."""
    file = httpx.get(answer.json()["path"]).content
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    red, green, blue = pixels[112:144, 112:144].reshape(-1, 3).mean(axis=0)
    seen = {
        "red": red > green + 60 and red > blue + 60,
        "blue": blue > red + 40 and blue > green + 40,
        "green": green > red + 40 and green > blue + 40,
        "yellow": red > blue + 60 and green > blue + 60,
        "purple": red > green + 30 and blue > green + 30,
    }
    return bool(seen[COLOURS[number % len(COLOURS)]])


def alike(one: bytes, other: bytes) -> float:
    """PSNR of two image files in dB; infinite if they are equal."""
    a, b = (np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(float) for file in (one, other))
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def least_told(least: float) -> str:
    """Format a PSNR, and whether it counts as equal."""
    reported = "equal" if least == float("inf") else f"{least:.1f} dB"
    return reported if least >= _SAME_DB else f"{reported}, which is another picture"


@contextmanager
def server(
    folder: Path, store: StorageServer, command: list[str], **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client, str]]:
    """A ready server with its own bucket in the S3 server."""
    folder.mkdir()
    port, bucket = free_port(), make_s3_bucket(store)
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
        **{
            "PYTHONPATH": str(ROOT),
            "PORT": str(port),
            "MODELS": "embedded",
            "CPU_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        },
        **{"UI": "0", "STORAGE_PROVIDER": "s3", "BUCKET_NAME": bucket, "R2_ENDPOINT_URL": store.url},
        **{
            "PUBLIC_BASE_URL": f"{store.url}/{bucket}",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
        },
        **{"AWS_DEFAULT_REGION": "us-east-1", "QUEUE_LIMIT": str(QUEUE)},
        **settings,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)  # noqa: S603  # our own
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            wait_for(client)
            if "deploy.ray_serve" in command:
                until(lambda: b"replicas draw at" in (folder / "log").read_bytes())
            yield process, client, bucket
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(120)


def replicas(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes of the replicas, below the one that started Ray."""
    found = psutil.Process(process.pid).children(recursive=True)
    living = []
    for child in found:
        with suppress(psutil.NoSuchProcess):  # zombies raise it too
            if "ServeReplica" in " ".join(child.cmdline()):
                living.append(child)
    return living


def accept(client: httpx.Client, text: str, **more: Any) -> str:
    """Submit a job; returns its id."""
    answer = client.post(CREATE, json={"prompt": text, **SMALL, **more}, headers=ASYNC)
    answer.raise_for_status()
    return str(answer.json()["id"])


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job as JSON; its state is `unknown` while the server cannot give it."""
    answer = client.get(f"/jobs/{job_id}")
    return dict(answer.json()) if answer.status_code == 200 else {"state": "unknown"}


def objects(store: StorageServer, bucket: str) -> set[str]:
    """The keys in a bucket."""
    pages = s3_client(store.url).get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {item["Key"] for page in pages for item in page.get("Contents", ())}


def shown(counts: Counter[Any]) -> str:
    """Format counts, the most frequent first."""
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common()) or "none"


def tell(rows: list[tuple[str, str]]) -> None:
    """Print a table."""
    say("\n| what | measured |\n| --- | --- |")
    for what, measured in rows:
        say(f"| {what} | {measured} |")


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for five minutes at most."""
    end = time.monotonic() + 300
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


if __name__ == "__main__":
    main()
