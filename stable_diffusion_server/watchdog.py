"""Starts a server and starts it again when it dies, asks for it, or hangs with work in hand. Knows no HTTP, no models.

`python -m stable_diffusion_server.watchdog -- python -m stable_diffusion_server serve`. Signals are passed on; only
the process it started, with that one's own children, is ever ended. Whether there is work is read in `progress.txt`:
the second line counts the pictures under way, and the file changes with each sign of life. How the server ended is
written down for the next one to read (see `observability.deaths`): whoever is ended from outside has not failed.
Work or not, the event loop touches `event-loop.txt` while it runs and nothing it looks after stands still.
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

_LOOK_EVERY = 0.5
# Seconds before the first, second … start after deaths in quick succession; after the last there is no more.
BACK_OFF = (0.0, 1.0, 2.0, 4.0, 8.0)
_QUICK = 60.0
_SHORT = 5.0
# Beyond the seconds pictures are given, for answers, stores and the journal.
_TO_STOP = 30.0
# What a server ends with when it was told to, and when its settings or its address are wrong: no start can mend those.
_FINAL = (0, 2)
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


@dataclass
class Watchdog:
    """Keeps one command running. `hang` is the seconds without a sign of life that count as hanging; 0: never.

    Told to stop, a server has `grace` seconds for it, and is killed then.
    """

    command: Sequence[str]
    progress: Path
    hang: float
    back_off: Sequence[float] = BACK_OFF
    grace: float = 3600.0
    _child: subprocess.Popen[bytes] | None = None
    _stopping: bool = False
    _seen: tuple[int, int] = (0, 0)
    _seen_at: float = 0.0
    _is_childs: bool = False
    _hung: bool = False
    _beat: int = 0
    _beat_at: float = 0.0
    _beats: bool = False
    _stopping_at: float = 0.0

    def run(self) -> int:
        """The exit status to end with, once the command has ended for good."""
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        deaths = 0
        folder = self.progress.parent
        while True:
            started, run_before = time.monotonic(), current_run_id(folder)
            self._start()
            status = self._wait()
            if self._stopping or status in _FINAL:
                return status
            lived = time.monotonic() - started
            if report_crash(folder, run_before, status, hung=self._hung) is CrashCause.OUTSIDE:
                # No failure of the server's own, and no reason to give up: whoever does it may have theirs.
                wait = 0.0 if lived > _SHORT else 1.0
                _say(f"the server was ended from outside (status {status}); it is started again in {wait:g} s.")
                self._pause(wait)
                if self._stopping:
                    return status
                continue
            deaths = 1 if lived > _QUICK else deaths + 1
            if deaths > len(self.back_off):
                _say(f"the server died {deaths} times within moments; giving up.")
                return status
            wait = self.back_off[deaths - 1]
            _say(f"the server ended with status {status} after {lived:.0f} s; it is started again in {wait:g} s.")
            self._pause(wait)
            if self._stopping:
                return status

    def _start(self) -> None:
        self._seen, self._seen_at, self._is_childs = self._read(), time.monotonic(), False
        self._hung = False
        self._beat, self._beats = self._read_beat(), False
        # A group of its own: a terminal's Ctrl-C comes here and is passed on once, since twice would mean at once.
        self._child = subprocess.Popen(  # noqa: S603  # the command this program was given
            self.command, process_group=0, preexec_fn=_die_with_parent
        )
        if self._stopping:
            self._child.terminate()  # the signal came while there was no one to pass it on to

    def _wait(self) -> int:
        """The child's exit status as a shell tells it; a child that hangs is killed."""
        child = self._child
        assert child is not None  # noqa: S101  # started before; tells the type checker
        while True:
            try:
                status = child.wait(_LOOK_EVERY)
            except subprocess.TimeoutExpired:
                silent = self._silent()
                if 0 < self.hang < silent or self._stands_still():
                    _say(f"no sign of life for {self.hang:g} s; the server is killed.")
                    # An event loop alone that stands still is no fault of what is drawn.
                    self._hung = silent > self.hang / 2
                    os.killpg(child.pid, signal.SIGKILL)
                elif self._stopping and time.monotonic() - self._stopping_at > self.grace:
                    _say(f"the server did not stop within {self.grace:g} s; it is killed.")
                    os.killpg(child.pid, signal.SIGKILL)
            else:
                return status if status >= 0 else 128 - status

    def _silent(self) -> float:
        """Seconds for which nothing happened although there is work. What an earlier child left says nothing."""
        now = self._read()
        if now != self._seen:
            self._seen, self._seen_at, self._is_childs = now, time.monotonic(), True
        return time.monotonic() - self._seen_at if self._is_childs and self._seen[0] > 0 else 0.0

    def _stands_still(self) -> bool:
        """Whether the event loop, which beats work or not, has not for too long. One that ends takes its file away."""
        if (beat := self._read_beat()) != self._beat:
            self._beat, self._beat_at, self._beats = beat, time.monotonic(), beat != 0
        return self._beats and 0 < self.hang < time.monotonic() - self._beat_at

    def _read_beat(self) -> int:
        try:
            return self.progress.with_name(HEARTBEAT_FILE).stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self) -> tuple[int, int]:
        """The pictures under way, and when that was written."""
        try:
            lines, written = self.progress.read_text().splitlines(), self.progress.stat().st_mtime_ns
            return int(lines[1]), written
        except (OSError, ValueError, IndexError):
            return 0, 0  # not there, of another program, or being written

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < end:
            time.sleep(0.05)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if not self._stopping:
            self._stopping, self._stopping_at = True, time.monotonic()
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def main() -> None:
    """Run the command after `--` until it ends for good, or exit with 2 and one sentence."""
    arguments = sys.argv[1:]
    if len(arguments) < 2 or arguments[0] != "--":  # the mark and a command
        sys.stderr.write("usage: python -m stable_diffusion_server.watchdog -- command …\n")
        sys.exit(2)
    try:
        settings = read_settings()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    try:
        grace = settings.shutdown_grace_seconds + _TO_STOP
        progress = settings.data_dir / "progress.txt"
        sys.exit(Watchdog(arguments[1:], progress, settings.watchdog_timeout, grace=grace).run())
    except OSError as error:
        sys.stderr.write(f"{arguments[1]} cannot be started ({error.strerror}).\n")
        sys.exit(2)


def _say(what: str) -> None:
    sys.stderr.write(f"watchdog: {what}\n")
    sys.stderr.flush()


def _die_with_parent() -> None:
    """Have Linux stop the child when this process is killed, so that no server is left that no one watches."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
