"""The watchdog over small programs: what it restarts, what it leaves alone, which signals it forwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fakes import until

from stable_diffusion_server.app.lifecycle import DEVICE_LOST_STATUS

pytestmark = pytest.mark.slow

# Counts its starts in a file, then does what its argument says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
starts = Path("starts")
count = len(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text("x" * count)
Path("pid").write_text(str(os.getpid()))
progress = Path("data/progress.txt")
"""


class Watched:
    """A watchdog over a program, in a separate folder."""

    def __init__(self, folder: Path, program: str, **environment: str) -> None:
        self.folder = folder
        (folder / "data").mkdir()
        (folder / "program.py").write_text(PROGRAM + textwrap.dedent(program))
        self.log = folder / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(  # our own program, written here
                [sys.executable, "-m", "stable_diffusion_server.watchdog", "--", sys.executable, "program.py"],
                cwd=folder,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
                stderr=out,
            )

    @property
    def starts(self) -> int:
        counted = self.folder / "starts"
        return len(counted.read_text()) if counted.exists() else 0

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def ends(self) -> int:
        return self.process.wait(60)


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(0)", 0), ("sys.exit(2)", 2)])
def test_a_program_that_ends_for_good_is_not_started_again(tmp_path: Path, ends: str, status: int) -> None:
    """A clean exit, and a wrong setting, which no restart can fix."""
    watched = Watched(tmp_path, ends)
    assert (watched.ends(), watched.starts) == (status, 1)


@pytest.mark.parametrize(
    "ends", ["os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({DEVICE_LOST_STATUS})", "sys.exit(1)"]
)
def test_a_program_that_dies_or_asks_for_it_is_started_again(tmp_path: Path, ends: str) -> None:
    """Killed, with a lost device, or by an error: the next one does its work."""
    watched = Watched(tmp_path, f"if count < 2: {ends}\nsys.exit(0)")
    assert (watched.ends(), watched.starts) == (0, 2)
    assert "started again" in watched.log.read_text()


@pytest.mark.fault(56)
def test_a_program_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    """Five more starts with increasing delays, then the program's own exit status."""
    watched = Watched(tmp_path, "sys.exit(3)")
    time.sleep(1)
    assert watched.starts <= 3
    assert (watched.ends(), watched.starts) == (3, 6)
    assert "giving up" in watched.log.read_text()


@pytest.mark.fault(55)
def test_a_hang_with_work_in_hand_is_ended(tmp_path: Path) -> None:
    """No heartbeat for WATCHDOG_TIMEOUT during generation: killed with its children, and restarted."""
    watched = Watched(
        tmp_path,
        """
        if count > 1: sys.exit(0)
        progress.write_text("12:00:00\\n1\\n")
        time.sleep(600)
        """,
        WATCHDOG_TIMEOUT="1",
    )
    assert (watched.ends(), watched.starts) == (0, 2)
    assert "no sign of life" in watched.log.read_text()


def test_an_idle_program_and_one_that_makes_progress_are_let_be(tmp_path: Path) -> None:
    """Silence without work is idle; work with heartbeats is progress; an earlier program's file is ignored."""
    watched = Watched(
        tmp_path,
        """
        for number in range(8):
            progress.write_text(f"12:00:0{number}\\n1\\n")
            time.sleep(0.3)
        progress.write_text("12:00:09\\n0\\n")
        time.sleep(2)
        progress.write_text("12:00:09\\n1\\n")
        if count < 2: sys.exit(1)
        progress.write_text("12:00:09\\n0\\n")
        sys.exit(0)
        """,
        WATCHDOG_TIMEOUT="1",
    )
    assert (watched.ends(), watched.starts) == (0, 2)
    assert "no sign of life" not in watched.log.read_text()


@pytest.mark.fault(112)
@pytest.mark.parametrize(
    "work", ["", 'progress.write_text("12:00:00\\n0\\n")', 'progress.write_text("12:00:00\\n1\\n")'],
    ids=["never any work", "no work now", "work"],
)  # fmt: skip
def test_an_event_loop_that_stands_still_is_ended_work_or_not(tmp_path: Path, work: str) -> None:
    """Once it has touched its file and then does not for WATCHDOG_TIMEOUT, the program is killed and restarted."""
    watched = Watched(
        tmp_path,
        f"""
        if count > 1: sys.exit(0)
        {work}
        for _ in range(5):
            Path("data/event-loop.txt").touch()
            time.sleep(0.3)
        time.sleep(600)
        """,
        WATCHDOG_TIMEOUT="1",
    )
    assert (watched.ends(), watched.starts) == (0, 2)
    assert "no sign of life" in watched.log.read_text()


@pytest.mark.fault(112)
def test_an_event_loop_that_beats_or_has_ended_is_let_be(tmp_path: Path) -> None:
    """Beats keep an idle program alive; an earlier program's file is ignored, and so is a deleted file."""
    watched = Watched(
        tmp_path,
        """
        beat = Path("data/event-loop.txt")
        if count == 1:
            beat.touch()
            sys.exit(1)
        time.sleep(2)
        for _ in range(8):
            beat.touch()
            time.sleep(0.3)
        beat.unlink()
        time.sleep(2)
        sys.exit(0)
        """,
        WATCHDOG_TIMEOUT="1",
    )
    assert (watched.ends(), watched.starts) == (0, 2)
    assert "no sign of life" not in watched.log.read_text()


@pytest.mark.fault(112)
def test_a_program_that_does_not_stop_on_its_signal_is_killed(tmp_path: Path) -> None:
    """It gets a grace period, and then SIGKILL."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from stable_diffusion_server.watchdog import Watchdog\n"
        "program = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(600)'\n"
        "sys.exit(Watchdog([sys.executable, '-c', program], Path('progress.txt'), 0, grace=1).run())\n"
    )
    watching = subprocess.Popen(  # noqa: S603  # our own program, written above
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert watching.stdout is not None
    assert watching.stdout.readline() == b"1\n"
    watching.send_signal(signal.SIGTERM)
    _, reported = watching.communicate(timeout=60)
    assert b"did not stop within 1 s" in reported
    assert watching.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_ends_both(tmp_path: Path, number: signal.Signals) -> None:
    """The program ends in its own way, and is not restarted."""
    watched = Watched(
        tmp_path,
        """
        def stop(number, frame):
            time.sleep(0.3)
            Path("stopped").write_text(str(number))
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        Path("ready").write_text("")
        while True: time.sleep(1)
        """,
    )
    until(lambda: (tmp_path / "ready").exists())
    watched.process.send_signal(number)
    assert watched.ends() == 0
    assert (watched.starts, (tmp_path / "stopped").read_text()) == (1, str(int(number)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_no_program_is_left_that_no_one_watches(tmp_path: Path) -> None:
    """When the watchdog is killed, its program ends too."""
    watched = Watched(tmp_path, "Path('ready').write_text('')\nwhile True: time.sleep(1)")
    until(lambda: (tmp_path / "ready").exists())
    watched.process.kill()
    watched.ends()

    def gone() -> bool:
        status = Path(f"/proc/{watched.pid}/stat")
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"

    until(gone)


@pytest.mark.parametrize(
    ("arguments", "environment", "reported"),
    [
        ([], {}, "usage"),
        (["serve"], {}, "usage"),
        (["--", "no-such-program"], {}, "no-such-program cannot be started"),
        (["--", "true"], {"WATCHDOG_TIMEOUT": "soon"}, "WATCHDOG_TIMEOUT"),
    ],
)
def test_what_is_wrong_is_reported_in_one_sentence(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], reported: str
) -> None:
    """No command, a missing command, a wrong setting."""
    done = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-m", "stable_diffusion_server.watchdog", *arguments],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert reported in done.stderr
    assert len(done.stderr.splitlines()) == 1
