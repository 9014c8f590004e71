"""When `progress.txt` is written: on state changes at once, in between a few times per second."""

from __future__ import annotations

from pathlib import Path

import pytest

from stable_diffusion_server.observability import console_progress
from stable_diffusion_server.observability.console_progress import ProgressHeartbeat
from stable_diffusion_server.types import EngineEvent, EngineEventKind


class Clock:
    """A clock that the test sets; it counts the writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.now, self._path = 100.0, path
        monkeypatch.setattr(console_progress.time, "monotonic", lambda: self.now)

    def written(self) -> str | None:
        """Running jobs according to the file, `None` if it was not written since the last call."""
        if not self._path.exists():
            return None
        text = self._path.read_text()
        self._path.unlink()
        return text.splitlines()[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """The clock of this test's file."""
    return Clock(monkeypatch, tmp_path / "progress.txt")


def test_steps_within_a_moment_are_one_sign_of_life(clock: Clock, tmp_path: Path) -> None:
    """And the first step after that interval causes the next write."""
    heartbeat = ProgressHeartbeat(tmp_path / "progress.txt")
    heartbeat.observe(EngineEvent(EngineEventKind.STARTED, "a"))
    assert clock.written() == "1"
    for seconds, wanted in ((0.2, None), (0.04, None), (0.02, "1"), (0.24, None), (1.0, "1")):
        clock.now += seconds
        heartbeat.observe(EngineEvent(EngineEventKind.STEP, "a"))
        assert clock.written() == wanted


def test_the_first_start_and_the_last_end_are_written_at_once(clock: Clock, tmp_path: Path) -> None:
    """The watchdog's timer starts with the one, and stops with the other."""
    heartbeat = ProgressHeartbeat(tmp_path / "progress.txt")
    for _ in range(3):
        heartbeat.observe(EngineEvent(EngineEventKind.QUEUED, "a"))
        assert clock.written() == "1"
        heartbeat.observe(EngineEvent(EngineEventKind.STARTED, "a"))
        heartbeat.observe(EngineEvent(EngineEventKind.DONE, "a"))
        assert clock.written() == "0"


def test_a_crowd_that_comes_and_leaves_the_line_is_no_sign_of_life(clock: Clock, tmp_path: Path) -> None:
    """However long it goes on: the device does nothing meanwhile."""
    heartbeat = ProgressHeartbeat(tmp_path / "progress.txt")
    heartbeat.observe(EngineEvent(EngineEventKind.STARTED, "a"))
    assert clock.written() == "1"
    for name in "bcdef":
        clock.now += 10
        heartbeat.observe(EngineEvent(EngineEventKind.QUEUED, name))
        heartbeat.observe(EngineEvent(EngineEventKind.CANCELLED, name))
        assert clock.written() is None
