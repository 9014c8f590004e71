"""Every signal to every process of a watched server, idle and busy: accepted jobs finish. Fake model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import Server, free_port, start_server
from fakes import until
from test_server_jobs import SERVE, WATCHED, accept, answers, child_of, job

pytestmark = pytest.mark.slow

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def struck(server: Server, target: str, number: signal.Signals, port: int) -> Server:
    """The server after a signal to one of its processes: restarted by its watchdog, or by us if that has ended too."""
    worker, watchdog = child_of(server.process), server.process.pid
    assert worker is not None
    for pid in {"worker": [worker], "watchdog": [watchdog], "tree": [watchdog, worker]}[target]:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if target == "worker":
        until(lambda: child_of(server.process) not in (worker, None), 60)
        until(lambda: answers(server, "/readyz"), 60)
        return server
    server.process.wait(60)
    until(lambda: not alive(worker), 60)
    return start_server(server.folder, port, *WATCHED, *SERVE, PORT=str(port))


@pytest.mark.fault(50, 64)
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the watchdog's child in /proc")
@pytest.mark.parametrize("target", ["worker", "watchdog", "tree"])
@pytest.mark.parametrize("load", [0, 4])
def test_whatever_is_killed_what_was_accepted_is_drawn(tmp_path: Path, target: str, load: int) -> None:
    """Three signals in sequence; each time the server restarts and every accepted job ends with its image.

    Idle: the jobs ended before and are still there. Busy: one of them is running. None is generated three times.
    """
    port = free_port()
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port))
    try:
        for number in SIGNALS:
            names = [f"{number.name} {n}" for n in range(load or 2)]
            ids = [accept(server, f"a red circle {name}", save_path=f"{name}.webp") for name in names]
            reach(server, ids, under_way if load else all_done)
            server = struck(server, target, number, port)
            reach(server, ids, all_done)
            ended = reported(server, ids)
            assert {each["attempts"] for each in ended} <= ({1, 2} if load else {1})
            assert [httpx.get(each["receipt"]["path"]).status_code for each in ended] == [200] * len(ids)
    finally:
        server.stop()


def reported(server: Server, ids: list[str]) -> list[dict[str, Any]]:
    return [job(server, job_id) for job_id in ids]


def reach(server: Server, ids: list[str], how: Callable[[list[dict[str, Any]]], bool]) -> None:
    until(lambda: how(reported(server, ids)), 60)


def all_done(jobs: list[dict[str, Any]]) -> bool:
    return all(each["state"] == "done" for each in jobs)


def under_way(jobs: list[dict[str, Any]]) -> bool:
    return any(each["step"] > 1 for each in jobs)
