"""Measures a hundred identical requests at once against one: they should be generated once."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping

from benchmarks.http_client import Connection
from benchmarks.servers import OURS, Server, alone
from benchmarks.tables import Result, ratio, ratios, table

AT_ONCE, SINGLE = 100, 8


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Measure single requests and a hundred identical ones. Peers generate each of them, so they are left out.

    The requests use raw keep-alive connections: with a usual client, a hundred responses cost the client more than the
    server.
    """
    with alone(servers[OURS]):
        alone_seconds, together, more = asyncio.run(measured(servers[OURS], rounds, side))
    rows = [
        ("one alone", f"{1000 * statistics.median(alone_seconds):.0f}", "1"),
        ("a hundred equal", f"{1000 * statistics.median(together):.0f}", ratios(together, alone_seconds)),
    ]
    head = ("orders at once", "milliseconds until all are answered", "of one alone, by round")
    lines = [f"{side} × {side}; pictures drawn beside the one that was needed: {more}.", "", *table(head, rows), ""]
    return Result(lines, {"duplicate_requests, a hundred of one alone": ratio(together, alone_seconds)})


async def measured(server: Server, rounds: int, side: int) -> tuple[list[float], list[float], int]:
    """By round the median seconds of one alone and those of a hundred; how many pictures more than one were drawn.

    A first round is not counted.
    """
    connections = await asyncio.gather(*(Connection.open(server.port) for _ in range(AT_ONCE)))
    alone_seconds, together, more = [], [], 0
    for number in range(-1, rounds):
        singles = [
            (await seconds(server, connections[:1], f"one-{number}-{n}", 7_000_000 + 100 * number + n, side))[0]
            for n in range(SINGLE)
        ]
        took, drawn = await seconds(server, connections, f"same-{number}", 8_000_000 + number, side)
        if number >= 0:
            alone_seconds.append(statistics.median(singles))
            together.append(took)
            more += drawn - 1
    for connection in connections:
        connection.close()
    return alone_seconds, together, more


async def seconds(server: Server, connections: list[Connection], name: str, n: int, side: int) -> tuple[float, int]:
    """Seconds until a request is answered on all connections, and the number of images generated for it."""
    target, _ = server.request_of(name, n, side)
    began = time.perf_counter()
    answers = await asyncio.gather(*(connection.ask(target) for connection in connections))
    took = time.perf_counter() - began
    receipts = [json.loads(answer) for answer in answers]
    return took, sum(not receipt["cached"] and not receipt["coalesced"] for receipt in receipts)
