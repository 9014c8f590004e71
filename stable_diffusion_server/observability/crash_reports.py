"""Crash reports: why the previous process ended and which jobs were on the device then, in files in DATA_DIR.

The server writes the jobs on the device to `device.json`, in place, so that the file survives any end of the process;
a clean shutdown removes it. A crash leaves its traceback in `crash.log`. The watchdog writes the exit status to
`death.json`. Without a watchdog, the exit status is unknown, but a crash is still detected.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import structlog

from stable_diffusion_server.files import quarantine

_log = structlog.get_logger(__name__)

DEVICE_FILE, EXIT_FILE, TRACEBACK_FILE = "device.json", "death.json", "crash.log"
# Signals that people, supervisors and the kernel's OOM killer send; the process itself causes all other signals.
_EXTERNAL_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_MAX_TRACEBACK_BYTES = 2000


class CrashCause(StrEnum):
    """Whether the process crashed by itself or was killed from outside."""

    NONE = "none"
    OUTSIDE = "outside"
    OWN = "own"


@dataclass(frozen=True, slots=True)
class CrashReport:
    """How the previous process ended: labels of the jobs on the device, and whether one job ran alone there."""

    cause: CrashCause = CrashCause.NONE
    on_device: tuple[str, ...] = ()
    alone: bool = False
    reason: str = ""


class DeviceRecord:
    """Records in `folder` which jobs are on the device, before they run there. Safe from any thread.

    Writes nothing before `begin`; logs once if the disk is not writable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._run_id = uuid4().hex
        self._oom_kills: dict[str, int] = {}
        self._length = 0
        self._last: tuple[tuple[str, ...], bool] | None = None
        self._crash: IO[bytes] | None = None

    def begin(self) -> CrashReport:
        """Return how the previous process ended, and start recording the jobs on the device."""
        death = last_crash(self._folder)
        for name in (EXIT_FILE, DEVICE_FILE, TRACEBACK_FILE):
            _remove(self._folder / name)
        self._oom_kills = count_oom_kills()
        try:
            self._descriptor = os.open(self._folder / DEVICE_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            if not faulthandler.is_enabled():
                self._crash = (self._folder / TRACEBACK_FILE).open("wb")
                faulthandler.enable(self._crash)
        except OSError as error:
            _log.warning("crash reports are unavailable", reason=str(error))
        self.update([], alone=False)
        return death

    def update(self, labels: list[str], alone: bool) -> None:
        """Record the labels of the jobs on the device now; `alone`: one job has the device for itself."""
        descriptor, now = self._descriptor, (tuple(labels), alone)
        if descriptor is None or now == self._last:
            return
        self._last = now
        report = {"run": self._run_id, "killed": self._oom_kills, "on_device": labels, "alone": alone}
        written = json.dumps(report).encode()
        # One call, padded with blanks over the longest earlier text: a killed process has written all of it or nothing.
        self._length = max(self._length, len(written))
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, written.ljust(self._length), 0)

    def end(self) -> None:
        """Record a clean shutdown: remove the files of this process."""
        if self._crash is not None:
            faulthandler.disable()
            self._crash.close()
            self._crash = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            for name in (DEVICE_FILE, TRACEBACK_FILE):
                _remove(self._folder / name)


def last_crash(folder: Path) -> CrashReport:
    """Return how the process that wrote the record in `folder` ended; an empty report after a clean shutdown."""
    device = _read_json(folder / DEVICE_FILE)
    run, labels, alone = device.get("run"), device.get("on_device"), device.get("alone") is True
    if not isinstance(run, str) or not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        return CrashReport()
    report = _read_json(folder / EXIT_FILE)
    report = report if report.get("run") == run else {}
    cause, reason = _classify_exit(
        report, _read_traceback(folder), _oom_killed_since(device.get("killed"), count_oom_kills())
    )
    return CrashReport(cause, tuple(labels), alone, reason)


def report_crash(folder: Path, run_before: str, status: int, *, hung: bool) -> CrashCause:
    """Write the watchdog's report on how the process ended, for the next process; return the cause.

    `run_before` is the result of `current_run_id` before the process started.
    """
    device = _read_json(folder / DEVICE_FILE)
    report = {"run": device.get("run"), "status": status, "hung": hung}
    if device.get("run") not in (None, run_before):
        part = folder / f"{EXIT_FILE}.part"
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(report))
            part.replace(folder / EXIT_FILE)
    return _classify_exit(report, "", _oom_killed_since(device.get("killed"), count_oom_kills()))[0]


def current_run_id(folder: Path) -> str:
    """Return the random run id of the process that writes the record; empty if there is no record."""
    return str(_read_json(folder / DEVICE_FILE).get("run", ""))


def count_oom_kills() -> dict[str, int]:
    """Return the kernel's numbers of OOM kills, by counter: of this cgroup and of this boot."""
    counts: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root, name = (
                ("memory", "memory.oom_control") if "memory" in controllers.split(",") else ("", "memory.events")
            )
            if controllers and not root:
                continue
            # A container sees its own group as the root of the mount.
            for group in (Path("/sys/fs/cgroup", root, path.lstrip("/")), Path("/sys/fs/cgroup", root)):
                if (count := _read_oom_kills(group / name)) is not None:
                    counts[f"{group}:{group.stat().st_ino}"] = count
                    break
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if (count := _read_oom_kills(Path("/proc/vmstat"))) is not None:
            counts[f"boot {boot}"] = count
    return counts


def _classify_exit(report: dict[str, Any], crash: str, for_memory: bool) -> tuple[CrashCause, str]:
    """Return cause and reason of an exit, from the watchdog's report, the traceback and the kernel's OOM counter."""
    status = report.get("status")
    if report.get("hung") is True:
        return CrashCause.OWN, "it hung"
    if not isinstance(status, int):
        status = -signal.SIGKILL if not crash else -signal.SIGABRT
    number = -status if status < 0 else status - 128 if status > 128 else 0
    if number in _EXTERNAL_SIGNALS:
        if number == signal.SIGKILL and for_memory:
            return CrashCause.OWN, "the kernel killed it for want of memory"
        return CrashCause.OUTSIDE, f"it was sent {signal.Signals(number).name}, or nothing is known"
    return CrashCause.OWN, crash or (f"signal {number}" if number else f"status {status}")


def _oom_killed_since(before: object, now: dict[str, int]) -> bool:
    """Return whether the kernel's OOM killer ran since: in this cgroup if known, otherwise on this machine."""
    before = before if isinstance(before, dict) else {}
    same = [key for key in now if isinstance(before.get(key), int)]
    groups = [key for key in same if not key.startswith("boot ")] or same
    return any(now[key] > before[key] for key in groups)


def _read_oom_kills(path: Path) -> int | None:
    try:
        words = path.read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return None


def _read_traceback(folder: Path) -> str:
    try:
        with (folder / TRACEBACK_FILE).open("rb") as file:
            return file.read(_MAX_TRACEBACK_BYTES).decode("utf-8", "replace").strip().split("\n")[0]
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file is missing or holds anything else."""
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _remove(path: Path) -> None:
    """Delete a file; quarantine a folder of that name."""
    try:
        if path.is_dir() and not path.is_symlink():
            quarantine(path, "it is a folder")
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a file of an earlier process cannot be taken away", name=path.name, reason=str(error))
