"""Measures a hundred equal orders at once against one alone: they should be drawn once."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping

from benchmarks.contestants import OURS, Server, alone
from benchmarks.lines import Line
from benchmarks.tables import Result, ratio, ratios, table

AT_ONCE, LONE = 100, 8


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Rounds of some orders alone, and of a hundred equal ones. Peers draw each, and so are not asked.

    Both are asked over open lines by hand: a hundred answers would cost a usual client more than they do the server.
    """
    with alone(servers[OURS]):
        alone_seconds, together, more = asyncio.run(measured(servers[OURS], rounds, side))
    rows = [
        ("one alone", f"{1000 * statistics.median(alone_seconds):.0f}", "1"),
        ("a hundred equal", f"{1000 * statistics.median(together):.0f}", ratios(together, alone_seconds)),
    ]
    head = ("orders at once", "milliseconds until all are answered", "of one alone, by round")
    lines = [f"{side} × {side}; pictures drawn beside the one that was needed: {more}.", "", *table(head, rows), ""]
    return Result(lines, {"identical, a hundred of one alone": ratio(together, alone_seconds)})


async def measured(server: Server, rounds: int, side: int) -> tuple[list[float], list[float], int]:
    """By round the median seconds of one alone and those of a hundred; how many pictures more than one were drawn.

    A first round is not counted.
    """
    lines = await asyncio.gather(*(Line.open(server.port) for _ in range(AT_ONCE)))
    alone_seconds, together, more = [], [], 0
    for number in range(-1, rounds):
        singles = [
            (await seconds(server, lines[:1], f"one-{number}-{n}", 7_000_000 + 100 * number + n, side))[0]
            for n in range(LONE)
        ]
        took, drawn = await seconds(server, lines, f"same-{number}", 8_000_000 + number, side)
        if number >= 0:
            alone_seconds.append(statistics.median(singles))
            together.append(took)
            more += drawn - 1
    for line in lines:
        line.close()
    return alone_seconds, together, more


async def seconds(server: Server, lines: list[Line], name: str, n: int, side: int) -> tuple[float, int]:
    """How long it took until an order was answered on all the lines, and how many pictures were drawn for that."""
    target, _ = server.request_of(name, n, side)
    began = time.perf_counter()
    answers = await asyncio.gather(*(line.ask(target) for line in lines))
    took = time.perf_counter() - began
    receipts = [json.loads(answer) for answer in answers]
    return took, sum(not receipt["cached"] and not receipt["coalesced"] for receipt in receipts)
