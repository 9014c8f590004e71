"""Replicas: state folders, job requests across replicas, shutdown. Two applications in this process, without Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import ROOT
from fakes import FakeDenoiser, settings_in
from starlette.types import Message, Scope

from deploy.replicas import ReplicaApp, ReplicaHealth, ReplicaLease, owner_of, ranked, sticks_to, work_of
from stable_diffusion_server.app import create_app
from stable_diffusion_server.engine import EngineState

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ASYNC = {"Prefer": "respond-async"}
SMALL = {"width": 64, "height": 64}


class Neighbours:
    """The other replicas of this process, addressed as through Ray: who has it, then that one alone."""

    def __init__(self) -> None:
        self.hosts: dict[int, ReplicaApp] = {}

    async def holding(self, scope: Scope) -> dict[int, bool]:
        return {number: await host.has(scope) for number, host in self.hosts.items()}

    async def ask(self, number: int, scope: Scope) -> AsyncIterator[Message]:
        async for message in self.hosts[number].answer(scope):
            yield message


@asynccontextmanager
async def replica(
    folder: Path, neighbours: Neighbours, squares: FakeDenoiser | None = None
) -> AsyncIterator[tuple[ReplicaLease, httpx.AsyncClient, Any]]:
    """One ready replica, its client and its application."""
    shared = settings_in(folder)
    claim = ReplicaLease(shared.data_dir)
    app = create_app(claim.settings(shared), load=lambda settings: squares or FakeDenoiser())
    others = Neighbours()
    others.hosts = neighbours.hosts
    host = ReplicaApp(app, claim, others, drain_seconds=20, release=claim.release)
    async with (
        lived_through(host),
        httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://127.0.0.1", timeout=60) as client,
    ):
        neighbours.hosts[claim.number] = host
        yield claim, client, app
        neighbours.hosts.pop(claim.number)


@asynccontextmanager
async def lived_through(host: ReplicaApp) -> AsyncIterator[None]:
    """The lifespan of an ASGI application, as a server drives it."""
    inward: asyncio.Queue[Message] = asyncio.Queue()
    outward: asyncio.Queue[Message] = asyncio.Queue()
    life = asyncio.create_task(host({"type": "lifespan", "state": {}}, inward.get, outward.put))
    await inward.put({"type": "lifespan.startup"})
    assert (await outward.get())["type"] == "lifespan.startup.complete"
    yield
    await inward.put({"type": "lifespan.shutdown"})
    assert (await outward.get())["type"] == "lifespan.shutdown.complete"
    await life


def test_replicas_have_folders_of_their_own_and_one_with_a_journal_is_taken_up_first(tmp_path: Path) -> None:
    """No two live ones share a folder; the next replica takes over what an ended one left."""
    first, second = ReplicaLease(tmp_path), ReplicaLease(tmp_path)
    assert (first.number, second.number, second.tag) == (0, 1, "r1-")
    second.folder.mkdir()
    (second.folder / "journal.db").touch()
    first.release()
    second.release()
    assert ReplicaLease(tmp_path).number == 1


def test_a_replica_that_is_killed_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    """The kernel holds the lock, so SIGKILL releases it."""
    code = "import pathlib, time; from deploy.replicas import ReplicaLease\n"
    code += f"c = ReplicaLease(pathlib.Path({str(tmp_path)!r})); "
    code += "print(c.number, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:  # noqa: S603  # ours
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "0"
        other = ReplicaLease(tmp_path)
        assert other.number == 1
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
    assert ReplicaLease(tmp_path).number == 0


def test_a_root_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    """An `OSError`, not a replica without a folder."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ReplicaLease(tmp_path / "file" / "data")


def scope_of(path: str, client: str = "10.0.0.1", **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"path": path, "headers": raw, "client": (client, 1)}


def test_requests_stick_to_what_they_are_about_and_orders_to_nothing() -> None:
    """A job by its id, a replay by its key, a UI session by its client; other requests go to the less busy replica."""
    assert sticks_to(scope_of("/jobs/r3-abc/events")) == "r3-abc"
    assert sticks_to(scope_of(CREATE, idempotency_key="k" * 20)) == "k" * 20
    assert sticks_to(scope_of(CREATE, x_job_id="j" * 20)) == sticks_to(scope_of(f"/jobs/{'j' * 20}"))
    assert sticks_to(scope_of("/sdapi/v1/progress")) == sticks_to(scope_of("/sdapi/v1/txt2img"))
    assert sticks_to(scope_of("/ui/x")) != sticks_to(scope_of("/ui/x", client="10.0.0.2"))
    assert sticks_to(scope_of(CREATE)) is None
    assert (owner_of("r12-abc"), owner_of("my-own-id")) == (12, None)


def test_a_replica_that_goes_moves_only_what_was_its_own() -> None:
    """Rendezvous hashing: every other key stays where it was, and keys spread over all."""
    keys = [f"key-{number}" for number in range(300)]
    before = {key: ranked(key, [0, 1, 2, 3])[0] for key in keys}
    after = {key: ranked(key, [0, 1, 3])[0] for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == 2}
    assert all(40 < sum(owner == number for owner in before.values()) < 110 for number in range(4))


async def test_any_replica_answers_for_a_job_of_another(tmp_path: Path) -> None:
    """State, events and cancellation work on a replica that did not accept the job."""
    neighbours = Neighbours()
    gate = threading.Event()
    squares = FakeDenoiser(gate=gate)
    async with (
        replica(tmp_path, neighbours, squares) as (_, one, _),
        replica(tmp_path, neighbours) as (_, other, _),
    ):
        accepted = await one.post(CREATE, json={"prompt": "a red square", **SMALL}, headers=ASYNC)
        where = accepted.headers["location"]
        assert where.startswith("/jobs/r0-")
        assert (await other.get(where)).json()["state"] in ("queued", "running")
        cancelled = await one.post(CREATE, json={"prompt": "a blue square", **SMALL}, headers=ASYNC)
        assert (await other.delete(cancelled.headers["location"])).status_code < 300
        gate.set()
        events = (await other.get(f"{where}/events")).text
        assert "event: done" in events
        assert (await other.get(where)).json()["state"] == "done"
        assert (await other.get(cancelled.headers["location"])).json()["state"] == "cancelled"
        assert (await other.get("/jobs/r0-nobody-ever-had-this-id")).status_code == 404


async def test_a_job_of_a_replica_that_is_away_is_not_called_unknown(tmp_path: Path) -> None:
    """503 with Retry-After while no replica holds its folder; found again through the one that takes it over."""
    neighbours = Neighbours()
    async with replica(tmp_path, neighbours) as (_, other, _):
        async with replica(tmp_path, neighbours) as (gone, one, _):
            accepted = await one.post(CREATE, json={"prompt": "a red square", **SMALL}, headers=ASYNC)
            where = accepted.headers["location"]
        away = await other.get(where)
        assert (away.status_code, away.headers["retry-after"]) == (503, "5")
        assert away.headers["content-type"] == "application/problem+json"
        assert (await other.get("/jobs/an-id-of-the-clients-own")).status_code == 503
        async with replica(tmp_path, neighbours) as (back, _, _):
            assert back.number == gone.number
            assert (await other.get(where)).json()["state"] == "done"
            assert (await other.get("/jobs/an-id-of-the-clients-own")).status_code == 404


async def test_a_replica_that_is_stopped_ends_its_accepted_jobs_first(tmp_path: Path) -> None:
    """Waiting jobs finish before the application stops, and then the folder is free."""
    neighbours = Neighbours()
    squares = FakeDenoiser(seconds_per_step=0.01)
    async with replica(tmp_path, neighbours, squares) as (claim, client, app):
        for number in range(12):
            order = {"prompt": f"a red square {number}", **SMALL}
            assert (await client.post(CREATE, json=order, headers=ASYNC)).status_code == 202
        assert work_of(app) > 0
        jobs = app.state.jobs
    assert jobs.unfinished == 0
    assert len(squares.finished) == 12
    assert ReplicaLease(tmp_path / "data").number == claim.number


@pytest.mark.fault(191)
@pytest.mark.parametrize("step", [0.0, -3_600.0, 3_600.0, -4e8, 4e8])
def test_a_replica_is_replaced_for_its_device_and_not_for_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    """A failed engine, or silence with running work, is a reason; being idle is none, nor is a changed clock."""
    settings = settings_in(tmp_path, watchdog_timeout=60.0)
    engine = SimpleNamespace(state=EngineState.READY, reason="", running=1)
    app: Any = SimpleNamespace(state=SimpleNamespace(engine=engine))
    health = ReplicaHealth(settings)
    assert health.fault(app) == ""
    settings.data_dir.mkdir(parents=True)
    progress = settings.data_dir / "progress.txt"
    progress.write_text("")
    assert health.fault(app) == ""
    now, steady = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: now() + step)
    assert health.fault(app) == ""
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 59)
    assert health.fault(app) == ""
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 61)
    assert "no sign of life" in health.fault(app)
    os.utime(progress, (1, 1))  # a heartbeat with the time of a clock that was set back
    assert health.fault(app) == ""
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 122)
    assert "no sign of life" in health.fault(app)
    engine.running = 0
    assert health.fault(app) == ""
    engine.running = 1
    assert health.fault(app) == "", "silence counts from when there was work"
    engine.state, engine.reason = EngineState.FAILED, "The device is lost."
    assert health.fault(app) == "The device is lost."
