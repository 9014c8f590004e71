"""Runs the workloads side by side over ours and its peers, and writes one Markdown file. Measures nothing itself.

    python -m benchmarks.suite                                   all workloads, small; some minutes
    python -m benchmarks.suite --workloads throughput --rounds 5 --levels 1 4 16 64 --sides 128 256 --out FILE.md
    python -m benchmarks.suite --check                           exit code 1 when a ratio is worse than it may be

PEERS_PYTHON names an interpreter with LitServe and Ray beside PyTorch and diffusers, SERVER_ASYNC a copy of diffusers'
`examples/server-async`; without them the plain server is the only peer. Servers not asked at the moment are stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import cached_hits
from benchmarks.contestants import FACTS, available, servers
from benchmarks.loopback import say
from benchmarks.plots import draw_curves
from benchmarks.tables import Result, machine
from benchmarks.workloads import encoding, identical, lone, memory, mixed, stages, starting, throughput

# A ratio beyond its bound is a regression; far enough from what was measured to bear another machine's noise.
BOUNDS: dict[str, Callable[[float], bool]] = {
    "lone": lambda value: value <= 0.9,
    "throughput": lambda value: value >= 1.5,
    "identical": lambda value: value <= 2.0,
    "hits": lambda value: value >= 0.4,
    "memory": lambda value: value <= 1.1,
}
WORKLOADS = ("lone", "throughput", "mixed", "identical", "hits", "starting", "memory", "stages", "encoding")


def main() -> None:
    """Measure what was asked for, print it, store it, and judge it where that was asked for."""
    given = arguments()
    lines = [machine(), f"SDXL {FACTS.revision}, {given.rounds} rounds. {time.strftime('%Y-%m-%d')}.", ""]
    ratios: dict[str, float] = {}
    over_servers = [name for name in ("lone", "throughput", "mixed", "identical", "stages") if name in given.workloads]
    if over_servers:
        with servers(available(given.servers)) as started:
            for server in started.values():
                server.pause()
            for name in over_servers:
                lines += tell(name, measured(name, started, given), ratios, given)
    for name in (name for name in given.workloads if name not in over_servers):
        module = {"hits": cached_hits, "starting": starting, "memory": memory, "encoding": encoding}[name]
        lines += tell(name, module.measure(given.rounds), ratios, given)
    if given.out:
        given.out.write_text("\n".join(lines))
    if given.check:
        sys.exit(judged(ratios))


def arguments() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--servers", nargs="+", help="names of entries in contestants.py; all that compete by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 16], help="requests at once")
    parser.add_argument("--sides", type=int, nargs="+", default=[256])
    parser.add_argument("--out", type=Path, help="a Markdown file; curves go beside it as SVG")
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def measured(name: str, started: dict[str, throughput.Server], given: argparse.Namespace) -> Result:
    """The result of a workload over servers."""
    if name == "throughput":
        return throughput.measure(started, given.rounds, given.sides, given.levels)
    module = {"lone": lone, "mixed": mixed, "identical": identical, "stages": stages}[name]
    return module.measure(started, given.rounds, given.sides[-1])


def tell(name: str, result: Result, ratios: dict[str, float], given: argparse.Namespace) -> list[str]:
    """Print a result, draw its curves, keep its ratios: its lines."""
    lines = [f"## {name.capitalize()}", "", *result.lines]
    say("\n".join(lines))
    ratios |= result.ratios
    if given.out and result.curves:
        lines += [f"![{title}]({file})" for title, file in draw_curves(result.curves, given.out)] + [""]
    return lines


def judged(ratios: dict[str, float]) -> int:
    """Say of each ratio whether it is within its bound: 1 when one is not, else 0."""
    failed = 0
    for name, value in ratios.items():
        good = next(bound for kind, bound in BOUNDS.items() if name.startswith(kind))(value)
        failed |= not good
        say(f"{'ok ' if good else 'BAD'} {name}: {value:.2f}")
    return failed


if __name__ == "__main__":
    main()
