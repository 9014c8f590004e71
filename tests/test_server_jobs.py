"""Jobs of a server process: what survives a crash, and how it stops. Fake model, 0.1 s per step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 10}
WATCHED = (sys.executable, "-m", "stable_diffusion_server.watchdog", "--")
SERVE = (sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.1")


def child_of(process: subprocess.Popen[bytes]) -> int | None:
    """The server that a watchdog started; none between two servers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) <= 1
    return int(children[0]) if children else None


def accept(server: Server, prompt: str, **more: Any) -> str:
    answer = httpx.post(f"{server.url}{CREATE}", json={"prompt": prompt, **SMALL, **more}, headers=ASYNC, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(server: Server, job_id: str) -> dict[str, Any]:
    reported: dict[str, Any] = httpx.get(f"{server.url}/jobs/{job_id}", timeout=60).json()
    return reported


def answers(server: Server, path: str = "/healthz") -> bool:
    try:
        return httpx.get(f"{server.url}{path}", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.fault(50)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_is_killed_finishes_what_it_had_accepted(tmp_path: Path) -> None:
    """Kill -9 during ten jobs: the watchdog restarts the server, and all ten end once, each with its image."""
    port = free_port()
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port))
    try:
        prompt, steps = "a red circle on a blue background", 30
        ids = [accept(server, f"{prompt} {n}", save_path=f"{n}.webp", num_inference_steps=steps) for n in range(10)]
        until(lambda: any(job(server, job_id)["step"] > 2 for job_id in ids), 120)
        first = child_of(server.process)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: answers(server, "/readyz"), 60)
        assert child_of(server.process) != first
        until(lambda: all(job(server, job_id)["state"] == "done" for job_id in ids), 120)
        ended = [job(server, job_id) for job_id in ids]
        assert {reported["attempts"] for reported in ended} <= {1, 2}
        assert max(reported["attempts"] for reported in ended) == 2
        for reported in ended:
            assert httpx.get(reported["receipt"]["path"]).headers["content-type"] == "image/webp"
        stored = sorted(path.name for path in (tmp_path / "bucket" / "objects" / "static" / "uploads").glob("*.webp"))
        assert stored == sorted(f"{n}.webp" for n in range(10))
    finally:
        server.stop()


@pytest.mark.fault(55)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_hangs_is_replaced_and_loses_nothing(tmp_path: Path) -> None:
    """Stopped during generation, it sends no heartbeat; the next one runs its accepted jobs."""
    port = free_port()
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port), WATCHDOG_TIMEOUT="10")
    try:
        job_id = accept(server, "a red circle on a blue background", num_inference_steps=60)
        until(lambda: job(server, job_id)["step"] > 2)
        hanging = child_of(server.process)
        assert hanging is not None
        os.kill(hanging, signal.SIGSTOP)
        until(lambda: child_of(server.process) not in (hanging, None), 60)
        until(lambda: answers(server, "/readyz"), 60)
        until(lambda: job(server, job_id)["state"] == "done", 60)
        assert httpx.get(f"{server.url}{CREATE}", params={"prompt": "next", **SMALL}, timeout=60).status_code == 200
    finally:
        server.stop()


@pytest.mark.fault(112)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
def test_a_server_that_freezes_without_work_is_replaced(tmp_path: Path) -> None:
    """It generates nothing and answers nobody: that is a hang too."""
    port = free_port()
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port), WATCHDOG_TIMEOUT="10")
    try:
        until(lambda: (tmp_path / "data" / "event-loop.txt").exists(), 60)
        time.sleep(2)
        hanging = child_of(server.process)
        assert hanging is not None
        os.kill(hanging, signal.SIGSTOP)
        until(lambda: child_of(server.process) not in (hanging, None), 120)
        until(lambda: answers(server, "/readyz"), 120)
    finally:
        server.stop()


@pytest.mark.fault(50)
def test_a_signal_lets_what_is_drawn_end_and_keeps_the_rest_for_the_next_start(tmp_path: Path) -> None:
    """The running image is stored and its waiting caller answered; waiting jobs run after the restart."""
    port, places = free_port(), {"JOBS_CONCURRENCY": "1"}
    server = start_server(tmp_path, port, *SERVE, PORT=str(port), **places)
    asked = {"prompt": "a caller who waits", **SMALL}
    with ThreadPoolExecutor(1) as pool:
        ids = [accept(server, f"a red circle {n}") for n in range(4)]
        until(lambda: job(server, ids[0])["step"] > 0)
        waiting = pool.submit(httpx.get, f"{server.url}{CREATE}", params=asked, timeout=60)
        time.sleep(0.3)
        assert server.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert waiting.result().status_code in (200, 503)
    again = start_server(tmp_path, port, *SERVE, PORT=str(port), **places)
    try:
        until(lambda: all(job(again, job_id)["state"] == "done" for job_id in ids), 60)
        assert {job(again, job_id)["attempts"] for job_id in ids} == {1}
    finally:
        again.stop()


@pytest.mark.fault(50)
def test_a_second_signal_ends_the_server_at_once(tmp_path: Path) -> None:
    """The first waits for the running image, the second for nothing; accepted jobs stay."""
    port = free_port()
    server = start_server(tmp_path, port, *SERVE, PORT=str(port))
    job_id = accept(server, "a long one", num_inference_steps=100)
    until(lambda: job(server, job_id)["step"] > 0)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(1)  # within half a second, two count as one
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    again = start_server(tmp_path, port, *SERVE, PORT=str(port))
    try:
        assert job(again, job_id)["state"] in ("queued", "running")
        assert httpx.delete(f"{again.url}/jobs/{job_id}", timeout=60).json()["state"] == "cancelled"
    finally:
        again.stop()
