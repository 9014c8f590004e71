"""Measures a new user's first minute against a real server process, through HTTP only, and prints a table.

    python benchmarks/onboarding.py

Everything it starts listens on loopback and ends with it; loops are bounded.
"""

from __future__ import annotations

import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
CREATE = "/create_and_upload_image"
PROMPT = "a red circle on a blue background"


def main() -> None:
    """Start a server in an empty folder, measure, print, stop it."""
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        started = time.perf_counter()
        server = subprocess.Popen(  # our own server
            [sys.executable, "-m", "stable_diffusion_server", "serve"],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PORT": str(port), "PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                measure(client, started, rows)
        finally:
            server.terminate()
            server.wait(60)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")  # noqa: T201  # its output
    print("| what | measured |\n| --- | --- |")  # noqa: T201  # its output
    for what, measured in rows:
        print(f"| {what} | {measured} |")  # noqa: T201  # its output


def measure(client: httpx.Client, started: float, rows: list[tuple[str, str]]) -> None:
    """Fill the rows of the table, in the order in which a user notices them."""
    wait_for(client, "/healthz")
    rows.append(("start to /healthz answering", f"{time.perf_counter() - started:.1f} s"))
    wait_for(client, "/readyz")
    rows.append(("start to able to draw", f"{time.perf_counter() - started:.1f} s"))
    asked = {"prompt": PROMPT, "save_path": "demo/first.webp"}
    rows.append(("first picture, 1024 × 1024", f"{seconds(client, asked):.2f} s"))
    rows.append(("start to first picture", f"{time.perf_counter() - started:.1f} s"))
    cached = sorted(seconds(client, asked) for _ in range(100))
    rows.append(("the same again, cached: median / p99 of 100", f"{ms(cached[50])} / {ms(cached[98])}"))
    for model in ("sdxl", "flux"):
        lone = [seconds(client, {"prompt": PROMPT, "model": model, "seed": n}) for n in range(10)]
        rows.append((f"{model}, lone, 1024 × 1024: median of 10", f"{statistics.median(lone):.2f} s"))
    identical(client, rows)
    different(client, rows)


def identical(client: httpx.Client, rows: list[tuple[str, str]]) -> None:
    """Fifty concurrent equal requests."""
    before = drawn(client)
    with ThreadPoolExecutor(50) as pool:
        asked = {"prompt": PROMPT, "num_inference_steps": 8, "seed": 99}
        keys = list(pool.map(lambda _: client.get(CREATE, params=asked).json()["key"], range(50)))
    rows.append(
        ("50 identical at once: generations / different answers", f"{drawn(client) - before:.0f} / {len(set(keys))}")
    )


def different(client: httpx.Client, rows: list[tuple[str, str]]) -> None:
    """Sixteen concurrent different requests, while /healthz is polled every 10 ms."""
    stop, waits = threading.Event(), list[float]()

    def watch() -> None:
        with httpx.Client(base_url=client.base_url) as other:
            while not stop.wait(0.01):
                begun = time.perf_counter()
                other.get("/healthz")
                waits.append(time.perf_counter() - begun)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: seconds(client, {"prompt": PROMPT, "seed": 1000 + n}), range(16)))
    rows.append(("16 different at once, 1024 × 1024: all done after", f"{time.perf_counter() - begun:.2f} s"))
    stop.set()
    watcher.join()
    waits.sort()
    middle, high = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
    rows.append(
        (f"/healthz meanwhile: median / p99 / max of {len(waits)}", f"{ms(middle)} / {ms(high)} / {ms(waits[-1])}")
    )


def seconds(client: httpx.Client, asked: dict[str, object]) -> float:
    """Seconds that one request took."""
    begun = time.perf_counter()
    client.get(CREATE, params=asked).raise_for_status()
    return time.perf_counter() - begun


def drawn(client: httpx.Client) -> float:
    """Number of images generated so far, from the engine's counter."""
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith('sds_jobs_total{outcome="done"}')), 0.0)


def wait_for(client: httpx.Client, path: str) -> None:
    """Poll until the status is 200, for two minutes at most."""
    for _ in range(2400):
        try:
            if client.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError(path)


def ms(value: float) -> str:
    """Format seconds as milliseconds."""
    return f"{value * 1000:.1f} ms"


if __name__ == "__main__":
    main()
