"""Measures the seconds from a server's start until it can generate, cold and warm."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.servers import ENTRIES, MODEL, OURS, PLAIN, servers
from benchmarks.tables import Result, table


def measure(rounds: int) -> Result:
    """Ours and the plain one in turns: the first start without compiled Python and cached weights, then warm ones."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name in (OURS, PLAIN):
                compiled = Path(folder) / name
                if number == 0:
                    shutil.rmtree(compiled, ignore_errors=True)
                    forget_weights()
                with servers({name: ENTRIES[name].with_environment(PYTHONPYCACHEPREFIX=str(compiled))}) as started:
                    seconds.setdefault((name, "warm" if number else "cold"), []).append(started[name].ready)
    rows = [
        (name, kind, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}")
        for (name, kind), values in seconds.items()
    ]
    head = ("server", "start", "seconds until it can draw", "range")
    lines = ["Cold: no compiled Python, weights not in the page cache. Warm: the starts after it.", ""]
    return Result([*lines, *table(head, rows), ""])


def forget_weights() -> None:
    """Let the system drop the weights' pages, as if they had not been read before."""
    for file in MODEL.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
