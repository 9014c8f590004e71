"""Measures pictures a second where tasks are mixed: half text, half image to image.

Not inpainting: diffusers' own pipeline for it takes a UNet of four or nine channels, and the embedded one has sixteen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from benchmarks.servers import OURS, PLAIN, Server, alone
from benchmarks.tables import Result, ratio, ratios, table
from benchmarks.workloads.memory import as_text, picture, restyle

AT_ONCE = 16
_numbers = count(1)


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Ours and the plain servers, which alone of the peers are taught the other tasks."""
    chosen = {name: server for name, server in servers.items() if server.entry.script in (None, "plain.py")}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(-1, rounds):
        for name, server in chosen.items():
            rate = burst(server)
            if number >= 0:
                rates[name].append(rate)
    rows = [
        (name, server.entry.tuning, f"{statistics.median(rates[name]):.1f}", ratios(rates[name], rates[PLAIN]))
        for name, server in chosen.items()
    ]
    lines = [f"256 × 256, {AT_ONCE} at once of {2 * AT_ONCE} different orders a round, strength 0.6:", ""]
    head = ("server", "cores used as", "pictures/s", "of the plain one's, by round")
    result = Result([*lines, *table(head, rows), ""])
    if OURS in chosen:
        result.ratios["throughput of mixed tasks, of the plain server's"] = ratio(rates[OURS], rates[PLAIN])
    return result


def burst(server: Server) -> float:
    """Pictures a second."""
    first = next(_numbers) * 10_000
    with alone(server):
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda n: ask(server, first + n), range(2 * AT_ONCE)))
        return 2 * AT_ONCE / (time.perf_counter() - started)


def ask(server: Server, n: int) -> None:
    """The n-th order: by turns text and image to image."""
    name = f"mixed-{n}"
    if server.entry.script is not None:
        server.draw(name, n, 256, **({"image": as_text(picture())} if n % 2 else {}))
    elif n % 2:
        restyle(server, name, canny=False, seed=n)
    else:
        server.draw(name, n, 256)
