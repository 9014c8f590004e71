"""Ends: a signal drains the engine before the server program waits; a lost device ends the process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What a process exits with whose device can only be used again by another one.
POISONED = 86
# A signal that comes twice within so many seconds is one: systemd and `docker compose` tell every process, and the
# watchdog passes on its own.
_SAME_SIGNAL_SECONDS = 0.5
# For the answers under way, which tell their callers to come back.
_LAST_WORDS_SECONDS = 1.0


def leave_soon() -> None:
    """End the process in a moment with its own exit status, so that whoever supervises it starts another.

    Not by the ordinary way out: what would be closed there may wait for the lost device for ever.
    """

    def leave() -> None:
        time.sleep(_LAST_WORDS_SECONDS)
        os._exit(POISONED)

    threading.Thread(target=leave, name="leave", daemon=True).start()


@contextmanager
def drained_by_signals(*drains: Callable[[], object]) -> Iterator[None]:
    """Have a signal take no more work, before what the server program does with it; a second one end all at once.

    uvicorn waits for open connections first, and those wait for pictures.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a test's event loop: signals are not its business
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping_since: float | None = None

    def drain(number: int, frame: FrameType | None) -> None:
        nonlocal stopping_since
        now = time.monotonic()
        if stopping_since is not None:
            if now - stopping_since > _SAME_SIGNAL_SECONDS:
                os._exit(128 + number)  # what was accepted is in the journal
            return
        stopping_since = now
        for call in drains:
            # On a thread of its own: a handler may interrupt the holder of the very lock it needs.
            threading.Thread(target=call, name="drain").start()
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    for number in before:
        signal.signal(number, drain)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
