"""Measures where a lone request's time goes, by what its receipt says and what is left over."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from benchmarks.servers import OURS, Server, alone
from benchmarks.tables import Result, percentile, table

STAGES = ("queue", "prepare", "denoise", "decode", "encode", "store")
REQUESTS = 20


def measure(servers: Mapping[str, Server], rounds: int, side: int) -> Result:
    """Some requests a round, one at a time."""
    server = servers[OURS]
    spent: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "all else", "whole request")}
    with alone(server):
        for number in range(-REQUESTS // 4, REQUESTS * rounds):
            began = time.perf_counter()
            timings = server.draw(f"stage-{number}", 9_000_000 + number, side)["timings"]
            whole = time.perf_counter() - began
            if number >= 0:
                rest = whole - sum(timings[stage] for stage in STAGES)
                for name, value in {"all else": rest, "whole request": whole}.items():
                    spent[name].append(value)
                for name in STAGES:
                    spent[name].append(timings[name])
    whole = statistics.median(spent["whole request"])
    rows = [
        (
            name,
            f"{1000 * statistics.median(values):.1f}",
            f"{1000 * percentile(values, 0.9):.1f}",
            f"{statistics.median(values) / whole:.0%}",
        )
        for name, values in spent.items()
    ]
    lines = [f"{side} × {side}, {REQUESTS * rounds} requests, one at a time.", ""]
    return Result([*lines, *table(("stage", "median ms", "p90 ms", "share"), rows), ""])
