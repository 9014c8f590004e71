"""Shows how far a download is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO

from tqdm import tqdm

_SECONDS = 10.0


class FetchProgress:
    """Writes to `stream`, which is stderr by default, since the result of the command goes to stdout."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._bar: tqdm[None] | None = None
        self._name, self._shown_at = "", 0.0

    def begin(self, name: str) -> None:
        """Start with a file; `name` is printable."""
        self.end()
        self._name, self._shown_at = name, -_SECONDS

    def report(self, done: int, size: int | None) -> None:
        """Show that `done` bytes of the file are there."""
        if self._stream.isatty():
            if self._bar is None:
                self._bar = tqdm(
                    total=size, initial=done, desc=self._name, unit="B", unit_scale=True, file=self._stream, leave=False
                )
            self._bar.update(done - self._bar.n)
        elif done == size or self._clock() - self._shown_at >= _SECONDS:
            self._shown_at = self._clock()
            share = f" ({100 * done // size} %)" if size else ""
            self._stream.write(f"{self._name}: {size_text(done)}{f' of {size_text(size)}' if size else ''}{share}\n")
            self._stream.flush()

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def size_text(size: int) -> str:
    """A number of bytes as people write it: `6.9 GB`, `1.2 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
