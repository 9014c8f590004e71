"""Runs the workloads on our server and on its peers, and writes one Markdown file.

    python -m benchmarks.suite                                   all workloads, small; some minutes
    python -m benchmarks.suite --workloads throughput --rounds 5 --levels 1 4 16 64 --sides 128 256 --out FILE.md
    python -m benchmarks.suite --check                           exit code 1 when a ratio is out of its bound

PEERS_PYTHON names an interpreter with LitServe, Ray, PyTorch and diffusers, SERVER_ASYNC a copy of diffusers'
`examples/server-async`; without them the plain server is the only peer. Servers that are not being measured are
suspended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import cached_hits
from benchmarks.loopback import say
from benchmarks.plots import draw_curves
from benchmarks.servers import FACTS, available, servers
from benchmarks.tables import Result, machine
from benchmarks.workloads import (
    duplicate_requests,
    encoding,
    memory,
    mixed,
    single_request,
    stages,
    startup,
    throughput,
)

# A ratio beyond its bound is a regression; bounds allow for the noise of another machine.
BOUNDS: dict[str, Callable[[float], bool]] = {
    "single_request": lambda value: value <= 0.9,
    "throughput": lambda value: value >= 1.5,
    "duplicate_requests": lambda value: value <= 2.0,
    "hits": lambda value: value >= 0.4,
    "memory": lambda value: value <= 1.1,
}
WORKLOADS = (
    "single_request",
    "throughput",
    "mixed",
    "duplicate_requests",
    "hits",
    "startup",
    "memory",
    "stages",
    "encoding",
)


def main() -> None:
    """Run the workloads, print and save their results, and with --check compare the ratios with their bounds."""
    given = arguments()
    lines = [machine(), f"SDXL {FACTS.revision}, {given.rounds} rounds. {time.strftime('%Y-%m-%d')}.", ""]
    ratios: dict[str, float] = {}
    over_servers = [
        name
        for name in ("single_request", "throughput", "mixed", "duplicate_requests", "stages")
        if name in given.workloads
    ]
    if over_servers:
        with servers(available(given.servers)) as started:
            for server in started.values():
                server.pause()
            for name in over_servers:
                lines += report(name, measured(name, started, given), ratios, given)
    for name in (name for name in given.workloads if name not in over_servers):
        module = {"hits": cached_hits, "startup": startup, "memory": memory, "encoding": encoding}[name]
        lines += report(name, module.measure(given.rounds), ratios, given)
    if given.out:
        given.out.write_text("\n".join(lines))
    if given.check:
        sys.exit(check_ratios(ratios))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--servers", nargs="+", help="names of entries in servers.py; all that compete by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 16], help="requests at once")
    parser.add_argument("--sides", type=int, nargs="+", default=[256])
    parser.add_argument("--out", type=Path, help="a Markdown file; curves go beside it as SVG")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def measured(name: str, started: dict[str, throughput.Server], given: argparse.Namespace) -> Result:
    """Run a workload on the servers."""
    if name == "throughput":
        return throughput.measure(started, given.rounds, given.sides, given.levels)
    module = {
        "single_request": single_request,
        "mixed": mixed,
        "duplicate_requests": duplicate_requests,
        "stages": stages,
    }[name]
    return module.measure(started, given.rounds, given.sides[-1])


def report(name: str, result: Result, ratios: dict[str, float], given: argparse.Namespace) -> list[str]:
    """Print a result, draw its curves and add its ratios to `ratios`. Returns its Markdown lines."""
    lines = [f"## {name.capitalize().replace('_', ' ')}", "", *result.lines]
    say("\n".join(lines))
    ratios |= result.ratios
    if given.out and result.curves:
        lines += [f"![{title}]({file})" for title, file in draw_curves(result.curves, given.out)] + [""]
    return lines


def check_ratios(ratios: dict[str, float]) -> int:
    """Print whether each ratio is within its bound; returns 1 if one is not, otherwise 0."""
    failed = 0
    for name, value in ratios.items():
        good = next(bound for kind, bound in BOUNDS.items() if name.startswith(kind))(value)
        failed |= not good
        say(f"{'ok ' if good else 'BAD'} {name}: {value:.2f}")
    return failed


if __name__ == "__main__":
    main()
