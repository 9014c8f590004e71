"""Supervises a server process: restarts it if it dies, requests a restart or hangs.

Usage: `python -m stable_diffusion_server.watchdog -- python -m stable_diffusion_server serve`.

The watchdog forwards signals, and kills only the started process and its children. It detects a hang by two files in
DATA_DIR. `progress.txt` changes whenever a request makes progress, and its second line is the number of running
requests: no change while requests run means that the engine hangs. The event loop touches `event-loop.txt`: no change
means that the event loop hangs. The watchdog reports to the next process how this one ended
(`observability.report_crash`); a kill from outside is not a failure of the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from stable_diffusion_server.observability import HEARTBEAT_FILE, CrashCause, current_run_id, report_crash
from stable_diffusion_server.settings import SettingsError, read_settings

_POLL_INTERVAL = 0.5
# Seconds before each restart after crashes in quick succession; after the last one the watchdog gives up.
BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0)
# A process that ran longer than this resets the back-off.
_STABLE_SECONDS = 60.0
# A process killed from outside sooner than this is restarted after 1 s, a later one at once.
_MIN_LIFETIME = 5.0
# Added to the grace time of running requests, for responses, uploads and the job store.
_SHUTDOWN_MARGIN = 30.0
# Exit statuses that a restart cannot improve: a requested stop, and wrong settings or a wrong address.
_FINAL_STATUSES = (0, 2)
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


@dataclass
class Watchdog:
    """Keeps one command running.

    Attributes:
        command: The command line.
        progress: Path of the progress file; the heartbeat file is in the same folder.
        hang: Seconds without progress after which the watchdog kills the process; 0 means never.
        back_off: Seconds before each restart after crashes in quick succession.
        grace: Seconds that the process has to stop after a signal before the watchdog kills it.
    """

    command: Sequence[str]
    progress: Path
    hang: float
    back_off: Sequence[float] = BACK_OFF
    grace: float = 3600.0
    _child: subprocess.Popen[bytes] | None = None
    _stopping: bool = False
    _last_progress: tuple[int, int] = (0, 0)
    _progress_at: float = 0.0
    _progress_is_current: bool = False
    _hung: bool = False
    _last_heartbeat: int = 0
    _heartbeat_at: float = 0.0
    _has_heartbeat: bool = False
    _stopping_at: float = 0.0

    def run(self) -> int:
        """Run the command, restarting it as needed, until its final end; return its exit status."""
        for number in _FORWARDED_SIGNALS:
            signal.signal(number, self._forward)
        crashes = 0
        folder = self.progress.parent
        while True:
            started, run_before = time.monotonic(), current_run_id(folder)
            self._start()
            status = self._wait()
            if self._stopping or status in _FINAL_STATUSES:
                return status
            lived = time.monotonic() - started
            if report_crash(folder, run_before, status, hung=self._hung) is CrashCause.OUTSIDE:
                # Not a failure of the server, so it does not count towards giving up.
                wait = 0.0 if lived > _MIN_LIFETIME else 1.0
                _log(f"the server was ended from outside (status {status}); it is started again in {wait:g} s.")
                self._pause(wait)
                if self._stopping:
                    return status
                continue
            crashes = 1 if lived > _STABLE_SECONDS else crashes + 1
            if crashes > len(self.back_off):
                _log(f"the server died {crashes} times within moments; giving up.")
                return status
            wait = self.back_off[crashes - 1]
            _log(f"the server ended with status {status} after {lived:.0f} s; it is started again in {wait:g} s.")
            self._pause(wait)
            if self._stopping:
                return status

    def _start(self) -> None:
        self._last_progress, self._progress_at = self._read_progress(), time.monotonic()
        self._progress_is_current = False
        self._hung = False
        self._last_heartbeat, self._has_heartbeat = self._read_heartbeat(), False
        # A separate process group: Ctrl-C reaches it once, forwarded; a second signal would skip the graceful stop.
        self._child = subprocess.Popen(  # noqa: S603  # the command this program was given
            self.command, process_group=0, preexec_fn=_die_with_parent
        )
        if self._stopping:
            self._child.terminate()  # the signal arrived before the process existed

    def _wait(self) -> int:
        """Wait for the process, kill it if it hangs; return its exit status like a shell (128 + signal number)."""
        child = self._child
        assert child is not None  # noqa: S101  # for the type checker
        while True:
            try:
                status = child.wait(_POLL_INTERVAL)
            except subprocess.TimeoutExpired:
                stalled = self._seconds_without_progress()
                if 0 < self.hang < stalled or self._event_loop_hangs():
                    _log(f"no sign of life for {self.hang:g} s; the server is killed.")
                    # If only the event loop hangs, the running requests are not the cause.
                    self._hung = stalled > self.hang / 2
                    os.killpg(child.pid, signal.SIGKILL)
                elif self._stopping and time.monotonic() - self._stopping_at > self.grace:
                    _log(f"the server did not stop within {self.grace:g} s; it is killed.")
                    os.killpg(child.pid, signal.SIGKILL)
            else:
                return status if status >= 0 else 128 - status

    def _seconds_without_progress(self) -> float:
        """Return seconds without progress while requests run, otherwise 0; ignore the file of an earlier process."""
        now = self._read_progress()
        if now != self._last_progress:
            self._last_progress, self._progress_at, self._progress_is_current = now, time.monotonic(), True
        return time.monotonic() - self._progress_at if self._progress_is_current and self._last_progress[0] > 0 else 0.0

    def _event_loop_hangs(self) -> bool:
        """Return whether the heartbeat is too old; a server that shuts down removes its file."""
        if (beat := self._read_heartbeat()) != self._last_heartbeat:
            self._last_heartbeat, self._heartbeat_at, self._has_heartbeat = beat, time.monotonic(), beat != 0
        return self._has_heartbeat and 0 < self.hang < time.monotonic() - self._heartbeat_at

    def _read_heartbeat(self) -> int:
        try:
            return self.progress.with_name(HEARTBEAT_FILE).stat().st_mtime_ns
        except OSError:
            return 0

    def _read_progress(self) -> tuple[int, int]:
        """Return the number of running requests, and the modification time of the file in nanoseconds."""
        try:
            lines, written = self.progress.read_text().splitlines(), self.progress.stat().st_mtime_ns
            return int(lines[1]), written
        except (OSError, ValueError, IndexError):
            return 0, 0  # missing, invalid, or being written

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < end:
            time.sleep(0.05)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping, self._stopping_at = True, time.monotonic()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def main() -> None:
    """Supervise the command after `--`, or exit with status 2 and a one-sentence error."""
    arguments = sys.argv[1:]
    if len(arguments) < 2 or arguments[0] != "--":
        sys.stderr.write("usage: python -m stable_diffusion_server.watchdog -- command …\n")
        sys.exit(2)
    try:
        settings = read_settings()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    try:
        grace = settings.shutdown_grace_seconds + _SHUTDOWN_MARGIN
        progress = settings.data_dir / "progress.txt"
        sys.exit(Watchdog(arguments[1:], progress, settings.watchdog_timeout, grace=grace).run())
    except OSError as error:
        sys.stderr.write(f"{arguments[1]} cannot be started ({error.strerror}).\n")
        sys.exit(2)


def _log(message: str) -> None:
    sys.stderr.write(f"watchdog: {message}\n")
    sys.stderr.flush()


def _die_with_parent() -> None:
    """On Linux, stop the child process when the watchdog is killed, so that no server runs unsupervised."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
