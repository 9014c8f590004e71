"""Measures a hundred equal orders at once against one alone: they should be drawn once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from benchmarks.contestants import OURS, Server, alone
from benchmarks.tables import Result, ratio, ratios, table

AT_ONCE, LONE = 100, 8


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Rounds of some orders alone, and of a hundred equal ones. Peers draw each, and so are not asked."""
    server = servers[OURS]
    alone_seconds, together, differing = [], [], 0
    with alone(server), ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(-1, rounds):
            singles = [seconds(server, f"one-{number}-{n}", 7_000_000 + 100 * number + n, side)[0] for n in range(LONE)]
            n, name = 8_000_000 + number, f"same-{number}"
            began = time.perf_counter()
            answers = list(pool.map(lambda _, n=n, name=name: seconds(server, name, n, side)[1], range(AT_ONCE)))
            if number >= 0:
                alone_seconds.append(statistics.median(singles))
                together.append(time.perf_counter() - began)
                differing += len({answer["path"] for answer in answers}) - 1
    rows = [
        ("one alone", f"{1000 * statistics.median(alone_seconds):.0f}", "1"),
        ("a hundred equal", f"{1000 * statistics.median(together):.0f}", ratios(together, alone_seconds)),
    ]
    head = ("orders at once", "milliseconds until all are answered", "of one alone, by round")
    lines = [f"{side} × {side}; answers that name another picture: {differing}.", "", *table(head, rows), ""]
    return Result(lines, {"identical, a hundred of one alone": ratio(together, alone_seconds)})


def seconds(server: Server, name: str, n: int, side: int) -> tuple[float, dict[str, object]]:
    """How long an order took, and its answer."""
    began = time.perf_counter()
    answer = server.draw(name, n, side)
    return time.perf_counter() - began, answer
