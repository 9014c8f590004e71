"""Sends requests made to exhaust memory or time; measures their cost to the server and to other clients.

`python benchmarks/body_bombs.py [ROOT]` starts the fake server (`tests/painted_server.py`: the whole server without
models) from the checkout ROOT, by default this one. It sends each of four bodies, and 120 searches without a match in a
history of 100,000 images. It prints the status codes, the seconds, the server's memory before, at its peak and after,
and the latency of `/healthz`, which is polled throughout.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240.0
SDAPI, CREATE = "/sdapi/v1/txt2img", "/create_and_upload_image"
# Name → path, body (`None`: a GET), number of concurrent requests.
BOMBS: dict[str, tuple[str, bytes | None, int]] = {
    "56 KB '[' + '1:' × 28,000": (SDAPI, json.dumps({"prompt": "[" + "1:" * 28_000}).encode(), 1),
    "1 MB of 'a,a,a' in lora, ten at once": (CREATE, json.dumps({"prompt": "a", "lora": "a," * 499_000}).encode(), 10),
    "28 MB of '<lora:a>', four at once": (SDAPI, json.dumps({"prompt": "<lora:a>" * 3_670_016}).encode(), 4),
    "30 MB of 10,000,000 empty objects": (SDAPI, b'{"prompt":"a","x":[' + b"{}," * 9_999_999 + b"{}]}", 1),
    "120 searches for what nobody drew": ("/history?q=zzzz", None, 120),
}
# Runs with the code of ROOT: fills its history with prompts of 1.8 KB.
FILL = """
import sys
from pathlib import Path
from stable_diffusion_server.storage.history.entries import HistoryEntry
from stable_diffusion_server.storage.history.index import HistoryIndex
index = HistoryIndex(Path(sys.argv[1]), 200_000, 0)
index.open()
words = "a red square on a blue background, "
for start in range(0, 100_000, 5_000):
    index.add([
        HistoryEntry(
            f"static/uploads/{n}.webp", f"{n}", words * 51 + str(n), "sdxl", "text_to_image", n, 64, 64, "", n, {}
        )
        for n in range(start, start + 5_000)
    ])
"""


class Watch(threading.Thread):
    """Polls `/healthz` every few milliseconds and samples the server's memory."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._process = process
        self._ended = threading.Event()
        self.waits: list[float] = []
        self.peak = 0

    def run(self) -> None:
        """Poll until `end` is called."""
        threading.Thread(target=self._weigh, daemon=True).start()
        with httpx.Client(timeout=SECONDS) as client:
            while not self._ended.is_set():
                began = time.perf_counter()
                with suppress(httpx.TransportError):  # the latency shows the failure
                    client.get(f"{self._url}/healthz")
                self.waits.append(time.perf_counter() - began)
                time.sleep(0.005)

    def _weigh(self) -> None:
        while not self._ended.is_set():
            self.peak = max(self.peak, self._process.memory_info().rss)
            time.sleep(0.01)

    def end(self) -> None:
        """Stop, and wait for the last response."""
        self._ended.set()
        self.join()


def send(url: str, body: bytes | None) -> str:
    """The status code of the response, or the name of the transport error."""
    try:
        if body is None:
            return str(httpx.get(url, timeout=SECONDS).status_code)
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=SECONDS)
    except httpx.TransportError as error:
        return type(error).__name__
    return str(answer.status_code)


def megabytes(size: float) -> str:
    """Format bytes as MB."""
    return f"{size / 1e6:.0f} MB"


def measured(name: str, url: str, process: psutil.Process) -> str:
    """One row of the table."""
    path, body, count = BOMBS[name]
    before = process.memory_info().rss
    watch = Watch(url, process)
    watch.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        answers = Counter(pool.map(lambda _: send(url + path, body), range(count)))
    took = time.perf_counter() - began
    time.sleep(0.5)
    watch.end()
    after = process.memory_info().rss
    waits = sorted(watch.waits)
    p99 = waits[min(len(waits) - 1, int(len(waits) * 0.99))]
    memory = " / ".join(megabytes(size) for size in (before, watch.peak, after))
    health = f"{statistics.median(waits) * 1000:.0f} / {p99 * 1000:.0f} / {waits[-1] * 1000:.0f} ms"
    reported = ", ".join(f"{number} × {status}" for status, number in sorted(answers.items()))
    return f"| {name} | {reported} | {took:.2f} s | {memory} | {health} |"


def main() -> None:
    """Start the server, and print a row for each body."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "PYTHONPATH": f"{root}:{root}/tests", "PORT": str(port)}
        environment |= {"DATA_DIR": f"{folder}/data", "LOCAL_BUCKET_DIR": f"{folder}/bucket", "UI": "0"}
        environment |= {"HISTORY_ENTRIES": "200000"}
        Path(folder, "data").mkdir(mode=0o700)
        filled = [sys.executable, "-c", FILL, f"{folder}/data/history.db"]
        subprocess.run(filled, cwd=folder, env=environment, check=True)  # noqa: S603  # our own command
        command = [sys.executable, str(root / "tests" / "painted_server.py"), "0"]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603  # our own command
        try:
            process = psutil.Process(server.pid)
            while True:
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            sys.stdout.write("| body | answer | took | memory before / peak / after | /healthz median / p99 / most |\n")
            sys.stdout.write("| --- | --- | --- | --- | --- |\n")
            for name in BOMBS:
                sys.stdout.write(measured(name, url, process) + "\n")
                sys.stdout.flush()
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
