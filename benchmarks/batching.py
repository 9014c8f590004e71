"""Measures throughput and lone latency against one job at a time, and against the stock pipeline behind a lock.

    python benchmarks/batching.py [rounds]

Four servers of the same models on loopback, asked in turns, so that load from elsewhere meets all of them alike: ours,
ours with LANES=2, ours with MAX_BATCH=1, and a plain FastAPI endpoint that calls the stock pipeline under a lock, draws
on the same canvas, enlarges in the same way and writes the same kind of file. PyTorch has one thread in each of them
(two in all with LANES=2), since on cores that others use as well more only wait for one another.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from loopback import free_port, say, wait_for

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
AT_ONCE, LONE, SIDE = 16, 8, 256
PLAIN = """
import sys, threading, time
from pathlib import Path
import torch, uvicorn
from diffusers import StableDiffusionXLPipeline
from fastapi import FastAPI
from PIL import Image
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[2], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
app, lock = FastAPI(), threading.Lock()
def draw(prompt, seed):
    return pipe(prompt, width=128, height=128, num_inference_steps=4, guidance_scale=2.0,
                generator=torch.Generator("cpu").manual_seed(seed)).images[0]
@app.get("/readyz")
def ready() -> dict[str, bool]:
    return {"ready": True}
@app.get("/create_and_upload_image")
def create(prompt: str, save_path: str, seed: int, width: int, height: int) -> dict[str, str]:
    with lock:
        picture = draw(prompt, seed)
    picture.resize((width, height), Image.Resampling.LANCZOS).save(save_path, quality=85)
    return {"path": save_path}
@app.get("/bare")
def bare(prompt: str, seed: int) -> dict[str, float]:
    with lock:
        started = time.perf_counter()
        draw(prompt, seed)
        return {"seconds": time.perf_counter() - started}
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
"""
SERVERS = {"ours": {"MAX_BATCH": "8"}, "ours, LANES=2": {"LANES": "2"}, "ours, MAX_BATCH=1": {"MAX_BATCH": "1"}}
PLAIN_NAME = "plain FastAPI, stock pipeline under a lock"
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")


def main() -> None:
    """Start the servers in an empty folder, measure in turns, print, end them."""
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            clients = start_all(Path(folder), started)
            load = os.getloadavg()[0]
            rates, lone, bare = measure(clients)
            caps = {name: cap_of(clients[name]) for name in SERVERS}
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(60)
    say(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, load before {load:.1f}.")
    say(f"{ROUNDS} rounds of {AT_ONCE} different pictures at once, {SIDE} × {SIDE}, embedded SDXL, 4 steps, then")
    say(f"{LONE} alone, all servers in turns.\n")
    say("| server | pictures a second | of the plain one's, by round | cap learnt |\n| --- | --- | --- | --- |")
    for name, values in rates.items():
        cells = f"{statistics.median(values):.1f} | {ratios(values, rates[PLAIN_NAME])} | {caps.get(name, '')}"
        say(f"| {name} | {cells} |")
    say(f"\nOurs against MAX_BATCH=1, by round: {ratios(rates['ours'], rates['ours, MAX_BATCH=1'])}.\n")
    say("| a lone request | milliseconds, median | of the bare pipeline call's, by round |\n| --- | --- | --- |")
    for name, values in {"bare pipeline call": bare, **lone}.items():
        say(f"| {name} | {1000 * statistics.median(values):.0f} | {ratios(values, bare)} |")


def measure(
    clients: dict[str, httpx.Client],
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Pictures a second and seconds of a lone request (with and without encoding and storing) by round."""
    rates: dict[str, list[float]] = {name: [] for name in clients}
    lone: dict[str, list[float]] = {PLAIN_NAME: [], "ours": [], "ours without encoding and storing": []}
    bare: list[float] = []
    for number in range(-2, ROUNDS):  # the first ones warm up, and let the caps be learnt
        for name, client in clients.items():
            started = time.perf_counter()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(asker(client, f"{number} at once"), range(AT_ONCE)))
            rates[name].append(AT_ONCE / (time.perf_counter() - started))
        times: dict[str, list[float]] = {name: [] for name in [*lone, "bare"]}
        for turn in range(LONE):
            for name in (PLAIN_NAME, "ours"):
                began = time.perf_counter()
                answer = asker(clients[name], f"{number} lone")(turn)
                times[name].append(time.perf_counter() - began)
            timings = answer["timings"]
            times["ours without encoding and storing"].append(times["ours"][-1] - timings["encode"] - timings["store"])
            query = {"prompt": prompt(turn), "seed": turn}
            times["bare"].append(clients[PLAIN_NAME].get("/bare", params=query).json()["seconds"])
        for name in lone:
            lone[name].append(statistics.median(times[name]))
        bare.append(statistics.median(times["bare"]))
    for values in (*rates.values(), *lone.values(), bare):
        del values[:2]
    return rates, lone, bare


def asker(client: httpx.Client, about: str) -> Callable[[int], dict[str, dict[str, float]]]:
    """What asks for the n-th picture of a round."""

    def ask(n: int) -> dict[str, dict[str, float]]:
        seed = hash((about, n)) % 2**32
        query = {"prompt": prompt(n), "save_path": f"{about} {n}.webp", "seed": seed, "width": SIDE, "height": SIDE}
        answer = client.get("/create_and_upload_image", params=query).raise_for_status().json()
        return dict(answer)

    return ask


def prompt(n: int) -> str:
    """Sixteen different prompts."""
    return f"a {COLOURS[n % 8]} {('circle', 'square')[n // 8 % 2]} on a {COLOURS[(n + 3) % 8]} background"


def ratios(values: list[float], others: list[float]) -> str:
    """The median ratio, and the smallest and largest."""
    each = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def cap_of(client: httpx.Client) -> str:
    """The batch cap in the metrics."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("sds_batch_cap{")]
    return ", ".join(line.rsplit(" ", 1)[1].removesuffix(".0") for line in lines)


def start_all(folder: Path, started: list[subprocess.Popen[bytes]]) -> dict[str, httpx.Client]:
    """A client for each server, which is ready."""
    clients = {}
    kept = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def start(name: str, command: list[str], port: int, **environment: str) -> None:
        home = folder / f"server {len(started)}"
        home.mkdir()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        line = [sys.executable, *command]
        started.append(subprocess.Popen(line, cwd=home, env={**kept, **environment}, **quiet))  # noqa: S603  # our own
        clients[name] = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300)

    for name, environment in SERVERS.items():
        port = free_port()
        serve = ["-m", "stable_diffusion_server", "serve"]
        start(name, serve, port, PORT=str(port), LOG_LEVEL="error", MODELS="embedded", **environment)
    port = free_port()
    start(PLAIN_NAME, ["-c", PLAIN, str(port), str(ROOT / "models" / "embedded-sdxl")], port)
    for client in clients.values():
        wait_for(client)
    return clients


if __name__ == "__main__":
    main()
