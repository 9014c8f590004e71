"""Crash reports: why a process ended, which jobs that counts against, and that a kill is not their fault.

Real processes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until
from test_server_jobs import SERVE, WATCHED, accept, answers, child_of, job

from stable_diffusion_server.jobs.policy import attribute_crash
from stable_diffusion_server.jobs.store.records import JobRecord, JobState
from stable_diffusion_server.observability import crash_reports
from stable_diffusion_server.observability.crash_reports import (
    CrashCause,
    CrashReport,
    DeviceRecord,
    last_crash,
    report_crash,
)
from stable_diffusion_server.types import Caller

pytestmark = pytest.mark.slow

LINUX = pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
RECORD = """
import ctypes, os, signal, sys
from pathlib import Path
from stable_diffusion_server.observability.crash_reports import DeviceRecord
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite started by nohup hands on that it is ignored
record = DeviceRecord(Path("."))
record.begin()
record.update(["job-1", ""], False)
"""
# How a process ends, and the cause: with a known exit status, and without.
ENDS = {
    "os.kill(os.getpid(), signal.SIGKILL)": (CrashCause.OUTSIDE, CrashCause.OUTSIDE),
    "os.kill(os.getpid(), signal.SIGTERM)": (CrashCause.OUTSIDE, CrashCause.OUTSIDE),
    "os.kill(os.getpid(), signal.SIGHUP)": (CrashCause.OUTSIDE, CrashCause.OUTSIDE),
    "os._exit(128 + signal.SIGINT)": (CrashCause.OUTSIDE, CrashCause.OUTSIDE),
    "ctypes.string_at(0)": (CrashCause.OWN, CrashCause.OWN),
    "os.abort()": (CrashCause.OWN, CrashCause.OWN),
    "os.kill(os.getpid(), signal.SIGBUS)": (CrashCause.OWN, CrashCause.OWN),
    "os.kill(os.getpid(), signal.SIGFPE)": (CrashCause.OWN, CrashCause.OWN),
    "os.kill(os.getpid(), signal.SIGILL)": (CrashCause.OWN, CrashCause.OWN),
    "os.kill(os.getpid(), signal.SIGSYS)": (CrashCause.OWN, CrashCause.OUTSIDE),
    "os._exit(3)": (CrashCause.OWN, CrashCause.OUTSIDE),
    "os._exit(86)": (CrashCause.OWN, CrashCause.OUTSIDE),
    "record.end()": (CrashCause.NONE, CrashCause.NONE),
}


def died(folder: Path, ending: str) -> int:
    """Exit status of a process that had two jobs on the device and ended this way."""
    done = subprocess.run(  # noqa: S603  # our own interpreter on a program written here
        [sys.executable, "-c", textwrap.dedent(RECORD) + ending],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode


@pytest.mark.fault(159)
@LINUX
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("ending", ENDS)
def test_it_is_known_whose_doing_an_end_was(tmp_path: Path, ending: str, watched: bool) -> None:
    """Signals from people are nobody's fault, crashes are the process's own; an orderly stop leaves no report."""
    cause = ENDS[ending][0 if watched else 1]
    status = died(tmp_path, ending)
    if watched and cause is not CrashCause.NONE:
        assert report_crash(tmp_path, "", status if status >= 0 else 128 - status, hung=False) is cause
    death = last_crash(tmp_path)
    assert death.cause is cause
    assert death.on_device == (() if cause is CrashCause.NONE else ("job-1", ""))
    assert DeviceRecord(tmp_path).begin().cause is cause
    assert last_crash(tmp_path).on_device == (), "a death is reported once"


@pytest.mark.fault(159)
@LINUX
def test_a_hang_and_a_kill_for_memory_are_the_servers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end by SIGKILL: the watchdog knows of the first, the kernel has counted the second."""
    status = died(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert report_crash(tmp_path, "", 128 - status, hung=True) is CrashCause.OWN
    assert last_crash(tmp_path).cause is CrashCause.OWN
    DeviceRecord(tmp_path).begin()
    status = died(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    before = crash_reports.count_oom_kills()
    assert before, "the kernel's count is found on this machine"
    for where in before:
        counts = {key: count + (key == where) for key, count in before.items()}
        monkeypatch.setattr(crash_reports, "count_oom_kills", lambda counts=counts: counts)
        groups = [key for key in before if not key.startswith("boot ")]
        told_by_it = where in groups or not groups
        assert last_crash(tmp_path).cause is (CrashCause.OWN if told_by_it else CrashCause.OUTSIDE)


@pytest.mark.fault(153)
@pytest.mark.parametrize("name", [crash_reports.DEVICE_FILE, crash_reports.EXIT_FILE, crash_reports.TRACEBACK_FILE])
@pytest.mark.parametrize("damage", ["garbage", "empty", "folder", "other JSON", "deep", "cut"])
def test_damaged_records_of_a_death_hold_up_nothing(tmp_path: Path, name: str, damage: str) -> None:
    """With any content in the file: the next process starts and writes its own, and the one after that reads it."""
    if not (tmp_path / name).exists():
        (tmp_path / name).touch()
    whole = json.dumps({"run": "x", "on_device": ["job-1"], "alone": True, "killed": {}, "status": 3}).encode()
    match damage:
        case "folder":
            (tmp_path / name).unlink()
            (tmp_path / name).mkdir()
            (tmp_path / name / "inside").touch()
        case _:
            written = {"garbage": os.urandom(99), "empty": b"", "deep": b"[" * 100_000, "cut": whole[:20]}
            (tmp_path / name).write_bytes(written.get(damage, b'{"run": 1, "on_device": {"a": []}}'))
    record = DeviceRecord(tmp_path)
    assert record.begin().on_device == ()
    record.update(["job-2"], True)
    assert last_crash(tmp_path).on_device == ("job-2",)
    record.end()


def entry(name: str, state: JobState = JobState.QUEUED, crashes: int = 0) -> JobRecord:
    return JobRecord(name, Caller("ann"), 0.0, state, crashes=crashes)


@pytest.mark.fault(150, 151)
def test_only_what_was_on_the_device_is_blamed_and_only_alone_when_suspected() -> None:
    """An external kill is counted separately; a crash makes suspects; a suspect that ran with others proves nothing."""
    jobs = [
        entry("a", JobState.RUNNING),
        entry("b", JobState.RUNNING),
        entry("c"),
        entry("d", JobState.RUNNING, crashes=1),
    ]

    def counted(death: CrashReport) -> dict[str, tuple[int, int]]:
        return {each.id: (each.crashes, each.kills) for each in attribute_crash(jobs, death)}

    none = {"a": (0, 0), "b": (0, 0), "c": (0, 0), "d": (1, 0)}
    assert counted(CrashReport(CrashCause.NONE, ("a",))) == none
    assert counted(CrashReport(CrashCause.OUTSIDE, ("a",))) == {**none, "a": (0, 1)}
    assert counted(CrashReport(CrashCause.OWN, ("a", ""))) == {**none, "a": (1, 0)}
    assert counted(CrashReport(CrashCause.OWN, ("d", "a"))) == {**none, "a": (1, 0)}, "d was not alone"
    assert counted(CrashReport(CrashCause.OWN, ("d",), alone=True)) == {**none, "d": (2, 0)}
    assert counted(CrashReport(CrashCause.OWN, ("",))) == none, "a request that waited was there"
    assert counted(CrashReport(CrashCause.OWN, ())) == {"a": (1, 0), "b": (1, 0), "c": (0, 0), "d": (1, 0)}
    assert [each.id for each in attribute_crash(jobs, CrashReport(CrashCause.OUTSIDE, ("a",)))] == ["b", "c", "a", "d"]


def ended(server: Server, ids: list[str], seconds: float = 120) -> list[dict[str, Any]]:
    def all_ended() -> bool:
        try:
            return all(job(server, job_id)["state"] in ("done", "failed", "cancelled") for job_id in ids)
        except (httpx.TransportError, KeyError, ValueError):
            return False  # between two processes

    until(all_ended, seconds)
    return [job(server, job_id) for job_id in ids]


@pytest.mark.fault(151)
@LINUX
@pytest.mark.parametrize("how", ["segfault", "abort", "exits", "hangs"])
def test_a_job_that_ends_the_server_is_failed_and_its_neighbours_are_drawn(tmp_path: Path, how: str) -> None:
    """It runs beside five others, then alone, then alone again: it fails by name, and all others finish."""
    port = free_port()
    hang = {"WATCHDOG_TIMEOUT": "2"} if how == "hangs" else {}
    server = start_server(tmp_path, port, *WATCHED, *SERVE, PORT=str(port), **hang)
    try:
        names = [*(f"a red circle {n}" for n in range(5)), f"it {how}"]
        ids = [accept(server, name) for name in names]
        reported = ended(server, ids)
        states = {each["id"]: each["state"] for each in reported}
        assert states.pop(ids[-1]) == "failed"
        assert reported[-1]["problem"]["type"].endswith("poison-job")
        assert set(states.values()) == {"done"}
        later = accept(server, "a green circle")
        assert ended(server, [later])[0]["state"] == "done"
    finally:
        server.stop()


@pytest.mark.fault(151)
@LINUX
def test_a_crash_is_known_for_one_without_a_watchdog_too(tmp_path: Path) -> None:
    """An outer loop restarts the server and reports no status: the traceback of the crash is the evidence."""
    port = free_port()
    server = start_server(tmp_path, port, *SERVE, PORT=str(port))
    starts = 1
    try:
        ids = [accept(server, name) for name in ("a red circle", "a blue circle", "a segfault")]
        while ended_or_dead(server, ids) is None:
            starts += 1
            with suppress(ProcessLookupError, AssertionError):  # it died again before the readiness check
                server = start_server(tmp_path, port, *SERVE, PORT=str(port))
        assert [each["state"] for each in ended(server, ids)] == ["done", "done", "failed"]
        assert starts == 4, "three deaths"
    finally:
        server.stop()


def ended_or_dead(server: Server, ids: list[str]) -> list[dict[str, Any]] | None:
    """The jobs once all have ended; nothing if the server has died meanwhile."""
    while server.process.poll() is None:
        try:
            return ended(server, ids, 0.5)
        except AssertionError:
            continue
    return None


@pytest.mark.fault(150)
@LINUX
@pytest.mark.parametrize("watched", [True, False])
def test_killing_the_server_again_and_again_fails_no_job(tmp_path: Path, watched: bool) -> None:
    """Six times kill -9, each during generation: twice the number of crashes that fails a job."""
    port, chance = free_port(), random.Random(7)  # noqa: S311  # test timing, no secret
    command: tuple[str, ...] = (*WATCHED, *SERVE) if watched else SERVE
    server = start_server(tmp_path, port, *command, PORT=str(port))
    try:
        ids = [accept(server, f"a red circle {n}", num_inference_steps=40) for n in range(4)]
        for _ in range(6):
            until(lambda: on_device(tmp_path) != [], 60)
            time.sleep(chance.uniform(0, 0.3))
            server = killed(server, tmp_path, port, watched=watched)
        assert [each["state"] for each in ended(server, ids)] == ["done"] * 4
    finally:
        server.stop()


def on_device(folder: Path) -> list[str]:
    """Requests on the device, from the server's own record."""
    try:
        reported: list[str] = json.loads((folder / "data" / crash_reports.DEVICE_FILE).read_bytes())["on_device"]
    except (OSError, ValueError):
        return []
    return reported


def killed(server: Server, folder: Path, port: int, *, watched: bool) -> Server:
    """The server after its process was killed, restarted by its watchdog or by us."""
    if not watched:
        server.process.kill()
        server.process.wait(60)
        return start_server(folder, port, *SERVE, PORT=str(port))
    victim = child_of(server.process)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    until(lambda: child_of(server.process) not in (victim, None), 60)
    until(lambda: answers(server, "/readyz"), 60)
    return server


def test_a_watchdog_that_was_not_heard_changes_nothing(tmp_path: Path) -> None:
    """A watchdog report about another process than the last one is ignored."""
    record = DeviceRecord(tmp_path)
    record.begin()
    record.update(["job-1"], False)
    (tmp_path / crash_reports.EXIT_FILE).write_text(json.dumps({"run": "another", "status": 139, "hung": False}))
    assert last_crash(tmp_path).cause is CrashCause.OUTSIDE
    assert report_crash(tmp_path, crash_reports.current_run_id(tmp_path), 139, hung=False) is CrashCause.OWN
    assert json.loads((tmp_path / crash_reports.EXIT_FILE).read_text())["run"] == "another", (
        "it had started another process"
    )
    record.end()
