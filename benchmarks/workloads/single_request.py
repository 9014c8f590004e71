"""Measures a single request against the bare pipeline call with resizing and encoding, run in the plain server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from benchmarks.servers import OURS, PLAIN, Server, alone
from benchmarks.tables import Result, ratio, ratios, table

BARE = "bare pipeline call, enlarging and encoding"


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Rounds of eight requests, one at a time, every server in turns."""
    times: dict[str, list[float]] = {BARE: [], **{name: [] for name in servers}}
    for number in range(-1, rounds):
        medians = {name: statistics.median(values) for name, values in _round(servers, side, number).items()}
        for name, value in medians.items() if number >= 0 else ():
            times[name].append(value)
    rows = [
        (name, f"{1000 * statistics.median(values):.0f}", ratios(values, times[BARE])) for name, values in times.items()
    ]
    result = Result([f"One request at a time, {side} × {side}, medians of eight by round:", ""])
    result.lines += [*table(("a single request", "milliseconds", "of the bare call's, by round"), rows), ""]
    if OURS in servers:
        result.ratios[f"single_request {side} × {side}, of the bare call's"] = ratio(times[OURS], times[BARE])
    return result


def _round(servers: Mapping[str, Server], side: int, number: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {BARE: [], **{name: [] for name in servers}}
    for turn in range(8):
        n = 5_000_000 + 100 * number + turn
        for name, server in servers.items():
            with alone(server):
                began = time.perf_counter()
                server.draw(f"single-{side}-{number}-{turn}", n, side)
                times[name].append(time.perf_counter() - began)
        with alone(servers[PLAIN]):
            times[BARE].append(servers[PLAIN].bare(f"bare-{turn}", n, side))
    return times
