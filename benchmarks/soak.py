"""Sends mixed requests of every task concurrently, disconnects some, and checks each image against its request.

    python benchmarks/soak.py [requests] [at once]

Each answered request is then generated again, alone, and the two files are compared: this reveals swapped images and
images changed by others in their batch. Also reports the server's memory during the run, and how many images are
generated for a hundred equal requests.
"""

from __future__ import annotations

import io
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
from loopback import free_port, say, wait_for
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
AT_ONCE = int(sys.argv[2]) if len(sys.argv) > 2 else 32
HANGS_UP, ALIKE_DB, EQUALS = 0.1, 45.0, 100
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
SIDES = (64, 96, 128, 128, 128, 192, 256)


@dataclass(frozen=True)
class Asked:
    """One request: route, parameters, files, and the seconds after which its client disconnects, if ever."""

    path: str
    fields: dict[str, str]
    files: dict[str, bytes]
    patience: float | None


def main() -> None:
    """Start a server in an empty folder, send, compare, print, stop it."""
    chance = random.Random(5)  # noqa: S311  # no secret
    orders = [order(chance, number) for number in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": folder, "LOG_LEVEL": "error"}
        environment["OMP_NUM_THREADS"] = "1"  # on shared cores more threads only wait for one another
        with Path(folder, "log").open("wb") as log:
            server = subprocess.Popen(  # our own server
                [sys.executable, "-m", "stable_diffusion_server", "serve"],
                cwd=folder,
                env={**environment, "PORT": str(port), "MODELS": "embedded", "MAX_BATCH": "8", "QUEUE_LIMIT": "64"},
                stdout=log,
                stderr=log,
            )
        try:
            limits = httpx.Limits(max_connections=AT_ONCE + 8)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
                wait_for(client)
                run(client, server.pid, orders)
        finally:
            server.terminate()
            server.wait(60)


def run(client: httpx.Client, pid: int, orders: list[Asked]) -> None:
    """Run the whole measurement."""
    equal = equal_orders(client)
    memory = [memory_of(pid)]
    answered, gone, seconds, likeness = 0, 0, 0.0, list[float]()
    fifth = math.ceil(len(orders) / 5)
    for start in range(0, len(orders), fifth):
        part = orders[start : start + fifth]
        began = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            pictures = list(pool.map(lambda asked: drawn(client, asked), part))
        seconds += time.perf_counter() - began
        for asked, picture in zip(part, pictures, strict=True):
            if picture is None:
                gone += 1
                continue
            answered += 1
            alone = drawn(client, Asked(asked.path, {**asked.fields, "overwrite": "true"}, asked.files, None))
            likeness.append(psnr(picture, alone or b""))
        memory.append(memory_of(pid))
        print(f"{start + len(part)} asked, least alike {min(likeness):.1f} dB", file=sys.stderr, flush=True)  # noqa: T201  # progress
    wrong = [value for value in likeness if value < ALIKE_DB]
    same = sum(math.isinf(value) for value in likeness)
    load = os.getloadavg()[0]
    say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load {load:.1f}.\n")
    say("| what | measured |\n| --- | --- |")
    say(f"| requests, {AT_ONCE} at once | {len(orders)} |")
    say(f"| answered; clients that hung up | {answered}; {gone} |")
    say(f"| pictures that differ from the same order drawn alone (under {ALIKE_DB:g} dB) | {len(wrong)} |")
    say(f"| equal to the byte of every pixel; the least alike of the rest | {same}; {least(likeness)} |")
    say(f"| all answered within | {seconds:.0f} s |")
    say(f"| memory in MB before, and after each fifth | {', '.join(f'{value:.0f}' for value in memory)} |")
    say(f"| pictures drawn for {EQUALS} equal orders at once | {equal:.0f} |")
    if wrong or equal != 1:
        raise SystemExit(1)


def order(chance: random.Random, number: int) -> Asked:
    """A request of any task."""
    width, height = chance.choice(SIDES), chance.choice(SIDES)
    shape = f"a {chance.choice(COLOURS)} {chance.choice(('circle', 'square', 'star'))}"
    fields = {
        "prompt": f"{shape} on a {chance.choice(COLOURS)} background",
        "save_path": f"{number}.png",
        "seed": str(chance.randrange(2**32)),
        "num_inference_steps": str(chance.randrange(2, 6)),
        "model": chance.choice(("sdxl", "sdxl", "flux")),
    }
    patience = chance.uniform(0.05, 3.0) if chance.random() < HANGS_UP else None
    match chance.randrange(3):
        case 0:
            path, files = "/make_image", {}
            fields |= {"width": str(width), "height": str(height)}
        case 1:
            path, files = "/style_transfer_and_upload_image", {"image_file": picture(chance, width, height)}
            edges = chance.random() < 0.5 and fields["model"] == "sdxl"  # the embedded Flux has no ControlNet
            fields |= {"strength": "0.6", "canny": str(edges).lower()}
        case _:
            path = "/inpaint_and_upload_image"
            files = {"image_file": picture(chance, width, height), "mask_file": mask(width, height)}
    return Asked(path, fields, files, patience)


def drawn(client: httpx.Client, asked: Asked) -> bytes | None:
    """The stored file of a request; `None` if its client disconnected."""
    files = {name: (f"{name}.png", data, "image/png") for name, data in asked.files.items()}
    try:
        answer = client.post(asked.path, data=asked.fields, files=files or None, timeout=asked.patience or 600)
    except httpx.TimeoutException:
        return None
    if answer.status_code != 200:
        raise SystemExit(f"{asked.path} answered {answer.status_code}: {answer.text[:300]}")
    if asked.path == "/make_image":
        return answer.content
    return client.get(httpx.URL(answer.json()["path"]).path).raise_for_status().content


def equal_orders(client: httpx.Client) -> float:
    """Number of images generated for many concurrent equal requests."""
    before = figure(client, 'sds_jobs_total{outcome="started"}')
    query = {"prompt": "a red circle", "width": 128, "height": 128}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(client.get, "/create_and_upload_image", params=query) for _ in range(EQUALS)]
        paths = {future.result().raise_for_status().json()["path"] for future in asked}
    if len(paths) != 1:
        raise SystemExit(f"{len(paths)} names for equal orders")
    return figure(client, 'sds_jobs_total{outcome="started"}') - before


def figure(client: httpx.Client, name: str) -> float:
    """The value of a metric."""
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " ")), 0.0)


def least(likeness: list[float]) -> str:
    """PSNR of the least similar pair that is not equal."""
    rest = [value for value in likeness if not math.isinf(value)]
    return f"{min(rest):.1f} dB" if rest else "none"


def psnr(one: bytes, other: bytes) -> float:
    """PSNR of two files in dB, infinite for equal pixels."""
    first, second = (np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), float) for file in (one, other))
    error = float(np.mean((first - second) ** 2)) if first.shape == second.shape else math.nan
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def picture(chance: random.Random, width: int, height: int) -> bytes:
    """An image file of two random colours."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:] = [chance.randrange(256) for _ in range(3)]
    pixels[height // 4 : height // 2, width // 4 : width // 2] = [chance.randrange(256) for _ in range(3)]
    return file_of(pixels)


def mask(width: int, height: int) -> bytes:
    """A mask that repaints the right half."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return file_of(pixels)


def file_of(pixels: np.ndarray) -> bytes:
    """The PNG file of an array."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def memory_of(pid: int) -> float:
    """Resident memory of a process in MB."""
    return psutil.Process(pid).memory_info().rss / 1e6


if __name__ == "__main__":
    main()
