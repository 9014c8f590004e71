"""How a download is shown: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

from stable_diffusion_server.app.fetch_progress import FetchProgress


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar() -> None:
    """With name, share and sizes; it is gone at the end."""
    terminal = Terminal()
    progress = FetchProgress(terminal)
    progress.begin("my.safetensors")
    progress.report(1_000_000, 4_000_000)
    shown = terminal.getvalue()
    assert "my.safetensors:  25%" in shown
    assert "1.00M/4.00M" in shown
    progress.end()
    assert "\n" not in terminal.getvalue()


def test_elsewhere_a_line_is_written_now_and_then() -> None:
    """The first, one every ten seconds, and the last; without control characters, also where the size is unknown."""
    now = [0.0]
    stream = io.StringIO()
    progress = FetchProgress(stream, lambda: now[0])
    progress.begin("my.safetensors")
    for second in range(21):
        now[0] = float(second)
        progress.report(second * 100_000_000, 2_100_000_000)
    progress.report(2_100_000_000, 2_100_000_000)
    progress.begin("other.safetensors")
    progress.report(5, None)
    assert stream.getvalue().splitlines() == [
        "my.safetensors: 0.0 MB of 2.1 GB (0 %)",
        "my.safetensors: 1.0 GB of 2.1 GB (47 %)",
        "my.safetensors: 2.0 GB of 2.1 GB (95 %)",
        "my.safetensors: 2.1 GB of 2.1 GB (100 %)",
        "other.safetensors: 0.0 MB",
    ]
