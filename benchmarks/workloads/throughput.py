"""Measures pictures a second and waiting times over concurrency: different orders, every server in turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from benchmarks.http_client import Connection
from benchmarks.servers import OURS, PLAIN, Server, alone
from benchmarks.tables import Result, percentile, ratio, ratios, table

_numbers = count(1)


def burst(server: Server, side: int, at_once: int, requests: int) -> tuple[float, list[float]]:
    """Pictures a second, and each request's seconds, of `requests` different orders of which `at_once` are open."""
    first = next(_numbers) * 10_000
    orders = iter([server.request_of(f"burst-{n}", n, side) for n in range(first, first + requests)])
    with alone(server):
        return asyncio.run(_burst(server, orders, at_once))


async def _burst(
    server: Server, orders: Iterator[tuple[str, dict[str, Any] | None]], at_once: int
) -> tuple[float, list[float]]:
    """As `burst`, over lines by hand: a usual client takes 5 ms of the same cores for a picture that takes 60."""
    lines = [await Connection.open(server.port) for _ in range(at_once)]
    waits: list[float] = []

    async def ask_on(line: Connection) -> None:
        for target, body in orders:
            began = time.perf_counter()
            await line.ask(target, body)
            waits.append(time.perf_counter() - began)
        line.close()

    started = time.perf_counter()
    await asyncio.gather(*(ask_on(line) for line in lines))
    return len(waits) / (time.perf_counter() - started), waits


def requests_of(at_once: int) -> int:
    """How many orders make a burst: enough to fill it, few enough to end."""
    return {1: 6, 4: 16, 16: 32}.get(at_once, at_once)


def measure(servers: Mapping[str, Server], rounds: int, sides: Sequence[int], levels: Sequence[int]) -> Result:
    """Every server at every size and concurrency; the first round warms up, and lets batch sizes be learnt."""
    result = Result([])
    for side in sides:
        rates = {(name, c): list[float]() for name in servers for c in levels}
        waits = {key: list[float]() for key in rates}
        for number in range(-1, rounds):
            for at_once in levels:
                for name, server in servers.items():
                    rate, seconds = burst(server, side, at_once, requests_of(at_once))
                    if number >= 0:
                        rates[name, at_once].append(rate)
                        waits[name, at_once] += seconds
        _tell(result, servers, side, levels, rates, waits)
    return result


def _tell(
    result: Result,
    servers: Mapping[str, Server],
    side: int,
    levels: Sequence[int],
    rates: Mapping[tuple[str, int], list[float]],
    waits: Mapping[tuple[str, int], list[float]],
) -> None:
    for at_once in levels:
        plain = rates[PLAIN, at_once]
        rows = [
            (
                name,
                server.entry.tuning,
                f"{statistics.median(rates[name, at_once]):.1f}",
                ratios(rates[name, at_once], plain),
                f"{1000 * statistics.median(waits[name, at_once]):.0f}",
                f"{1000 * percentile(waits[name, at_once], 0.99):.0f}",
            )
            for name, server in servers.items()
        ]
        result.lines += [f"{side} × {side}, {at_once} at once, {requests_of(at_once)} different orders a round:", ""]
        head = ("server", "cores used as", "pictures/s", "of the plain one's, by round", "median ms", "p99 ms")
        result.lines += [*table(head, rows), ""]
        if OURS in servers:
            key = f"throughput {side} × {side}, {at_once} at once, of the plain server's"
            result.ratios[key] = ratio(rates[OURS, at_once], plain)
            others = [name for name in servers if not name.startswith("ours")]
            best = max(others, key=lambda name: statistics.median(rates[name, at_once]))
            line = (
                f"Ours against the best of the others ({best}): {ratios(rates[OURS, at_once], rates[best, at_once])}."
            )
            result.lines += [line, ""]
    result.curves[f"{side} × {side}, pictures a second"] = {
        name: {c: statistics.median(rates[name, c]) for c in levels} for name in servers
    }
    result.curves[f"{side} × {side}, p99 in ms"] = {
        name: {c: 1000 * percentile(waits[name, c], 0.99) for c in levels} for name in servers
    }
