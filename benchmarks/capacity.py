"""Queueing simulation of 1, 10 and 1,000 devices with measured service times.

Run: `python -m benchmarks.capacity` (minutes); it prints the tables of docs/scaling.md and draws its plots. Each device
is one server with a bounded queue and continuous batching: requests join and leave at every step, `MAX_BATCH` images at
a time. Simulated with simpy; the other benchmarks measure a real server.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import simpy
from matplotlib import pyplot

from benchmarks.loopback import say

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "capacity", "svg.fonttype": "none", "font.size": 9})

# Seconds for an image of 256 × 256 and 4 steps (benchmarks/results/2026-11-23-batching.md): 8.5 a second one by one,
# 14.1 a second in batches of 8. So a step of b images takes (FIXED + b · EACH) / STEPS.
ALONE, TOGETHER, GROUP, STEPS = 1 / 8.5, 8 / 14.1, 8, 4
EACH = (TOGETHER - ALONE) / (GROUP - 1)
FIXED = ALONE - EACH
RATE = GROUP / TOGETHER
QUEUE = 64
DEVICES = (1, 10, 1000)
PLOTS = Path(__file__).resolve().parent.parent / "docs"
_COLOURS = {1: "#b3541e", 10: "#1f6f8b", 1000: "#4d4d4d"}


@dataclass
class Totals:
    """Results of one simulation; waits are seconds from request to image."""

    waits: list[float] = field(default_factory=list)
    refused: int = 0
    cached: int = 0
    coalesced: int = 0
    crowds: Counter[int] = field(default_factory=Counter)

    def percentile(self, part: float) -> float:
        """The wait that a share `part` of the completed requests does not exceed."""
        return sorted(self.waits)[min(len(self.waits) - 1, int(len(self.waits) * part))] if self.waits else float("inf")


@dataclass
class Wanted:
    """A waiting request, with the equal requests coalesced into it."""

    thing: int
    asked: list[float]
    left: int = STEPS


class Device:
    """One server: its queue, and the batch on its device."""

    def __init__(self, env: simpy.Environment, server: SimulatedServer) -> None:
        self._env, self._server = env, server
        self.queue: deque[Wanted] = deque()
        self.group: list[Wanted] = []
        self.by_thing: dict[int, Wanted] = {}
        self._woken = env.event()
        env.process(self._draw())

    @property
    def load(self) -> int:
        """Waiting and running images: what the load balancer compares."""
        return len(self.queue) + len(self.group)

    def ask(self, thing: int) -> None:
        """Join an equal request in progress, enter the queue, or be refused."""
        reported = self._server.reported
        if (same := self.by_thing.get(thing)) is not None:
            same.asked.append(self._env.now)
            reported.coalesced += 1
        elif len(self.queue) >= QUEUE:
            reported.refused += 1
        else:
            wanted = self.by_thing[thing] = Wanted(thing, [self._env.now])
            self.queue.append(wanted)
            if not self._woken.triggered:
                self._woken.succeed()

    def _draw(self) -> Generator[simpy.Event, object, None]:
        while True:
            while self.queue and len(self.group) < GROUP:
                self.group.append(self.queue.popleft())
            if not self.group:
                self._woken = self._env.event()
                yield self._woken
                continue
            yield self._env.timeout((FIXED + EACH * len(self.group)) / STEPS)
            for wanted in self.group:
                wanted.left -= 1
            for wanted in [wanted for wanted in self.group if wanted.left == 0]:
                del self.by_thing[wanted.thing]
                self._server.drew(wanted)
            self.group = [wanted for wanted in self.group if wanted.left]


class SimulatedServer:
    """Devices behind a load balancer, which picks the less busy of two random ones, or by content.

    By content means that equal requests go to the same device.
    """

    def __init__(self, devices: int, *, by_content: bool = False, seed: int = 1) -> None:
        self.env = simpy.Environment()
        self.reported = Totals()
        self._chance = random.Random(seed)  # noqa: S311  # a simulation, repeatable
        self._devices = [Device(self.env, self) for _ in range(devices)]
        self._by_content = by_content
        self._stored: set[int] = set()
        self._since = 0.0

    def drew(self, wanted: Wanted) -> None:
        """Record a finished and stored image, and the waits of all requests coalesced into it."""
        if wanted.thing < 0:
            self.reported.crowds[wanted.thing] += 1
        self._stored.add(wanted.thing)
        self.reported.waits += [self.env.now - asked for asked in wanted.asked if asked >= self._since]

    def run(self, rate: float, seconds: float, hits: float = 0.0, crowd: float = 0.0, every: float = 2.0) -> Totals:
        """Simulate Poisson arrivals at `rate` per second, after a fifth of `seconds` as warm-up.

        A share `hits` requests images stored long ago; a share `crowd` requests the same new image, which
        changes every `every` seconds.
        """
        self.env.process(self._orders(rate, hits, crowd, every))
        self.env.run(seconds / 5)
        self.reported, self._since = Totals(), self.env.now
        self.env.run(self._since + seconds)
        return self.reported

    def _orders(self, rate: float, hits: float, crowd: float, every: float) -> Generator[simpy.Event, object, None]:
        number = 0
        while True:
            yield self.env.timeout(self._chance.expovariate(rate))
            number += 1
            kind = self._chance.random()
            thing = -1 - int(self.env.now / every) if kind < crowd else number
            if thing in self._stored or crowd <= kind < crowd + hits:
                self.reported.cached += 1
                continue
            self._chosen(thing).ask(thing)

    def _chosen(self, thing: int) -> Device:
        if self._by_content:
            return self._devices[hash((thing, "salt")) % len(self._devices)]
        return min(self._chance.choices(self._devices, k=2), key=lambda device: device.load)


def utilisation(seconds: dict[int, float]) -> None:
    """Waits by utilisation: a table and a plot."""
    parts = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.1)
    say("| devices | " + " | ".join(f"{part:.0%}" for part in parts) + " |")
    say("| --- |" + " --- |" * len(parts))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), sharex=True)
    for devices in DEVICES:
        reported = {part: SimulatedServer(devices).run(part * RATE * devices, seconds[devices]) for part in parts}
        cells = [
            f"{one.percentile(0.5):.2f} / {one.percentile(0.99):.2f}" + (f", {share:.0%} refused" if share else "")
            for one in reported.values()
            for share in [round(one.refused / max(1, one.refused + len(one.waits)), 2)]
        ]
        say(f"| {devices:,} | " + " | ".join(cells) + " |")
        label = f"{devices:,} device{'s' * (devices > 1)}"
        for axes, part in ((left, 0.5), (right, 0.99)):
            axes.plot(
                parts, [one.percentile(part) for one in reported.values()], "o-", color=_COLOURS[devices], label=label
            )
    for axes, title in ((left, "median"), (right, "99th percentile")):
        axes.set(
            title=f"seconds to a picture, {title}", xlabel="orders offered, of what the devices can draw", yscale="log"
        )
        axes.grid(alpha=0.3)
    left.legend()
    saved(figure, "scaling-utilisation.svg")


def hit_rates(seconds: dict[int, float]) -> None:
    """Effect of stored images at an offered load of 1.5 times the capacity, by the share of cache hits."""
    shares = (0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    say(
        "\n| devices | "
        + " | ".join(f"{share:.0%} stored" for share in shares)
        + " |\n| --- |"
        + " --- |" * len(shares)
    )
    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    for devices in DEVICES:
        reported = [
            SimulatedServer(devices).run(1.5 * RATE * devices, seconds[devices], hits=share) for share in shares
        ]
        cells = [
            f"{one.percentile(0.99):.2f}, {one.refused / (one.refused + len(one.waits) + one.cached):.0%} refused"
            for one in reported
        ]
        say(f"| {devices:,} | " + " | ".join(cells) + " |")
        axes.plot(
            shares, [one.percentile(0.99) for one in reported], "o-", color=_COLOURS[devices], label=f"{devices:,}"
        )
    axes.set(
        title="1.5 times what the devices can draw is asked",
        xlabel="share of orders whose picture is stored",
        ylabel="seconds to a picture, 99th percentile",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="devices")
    saved(figure, "scaling-hits.svg")


def crowds(seconds: dict[int, float]) -> None:
    """Effect of coalescing: a share of all requests wants the same new image, which changes every two seconds."""
    say(
        "\n| devices | sent to | orders for the one thing | times it is drawn "
        "| of all orders coalesced, cached | p99, s | refused |"
    )
    say("| --- | --- | --- | --- | --- | --- | --- |")
    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    shares = (0.0, 0.2, 0.5, 0.8)
    for devices in DEVICES:
        for by_content in (False, True)[: 1 if devices == 1 else 2]:
            reported = []
            for share in shares:
                one = SimulatedServer(devices, by_content=by_content).run(
                    0.8 * RATE * devices, seconds[devices], crowd=share
                )
                reported.append(one)
                asked = len(one.waits) + one.refused + one.cached
                way = "any" if devices == 1 else "the device of that thing" if by_content else "the less busy of two"
                twice = statistics.mean(one.crowds.values()) if one.crowds else 0.0
                say(
                    f"| {devices:,} | {way} | {share:.0%} | {twice:.1f} | {one.coalesced / asked:.1%}, "
                    f"{one.cached / asked:.1%} | {one.percentile(0.99):.2f} | {one.refused / asked:.1%} |"
                )
            style = "o--" if by_content else "o-"
            label = f"{devices:,}" + (", by content" if by_content else "")
            axes.plot(shares, [one.percentile(0.99) for one in reported], style, color=_COLOURS[devices], label=label)
    axes.set(
        title="80 % of what the devices can draw is asked",
        xlabel="share of orders for the thing of the moment",
        ylabel="seconds to a picture, 99th percentile",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="devices")
    saved(figure, "scaling-crowds.svg")


def saved(figure: pyplot.Figure, name: str) -> None:
    """Write a plot next to the page that shows it."""
    figure.tight_layout()
    figure.savefig(PLOTS / name, metadata={"Date": None})
    pyplot.close(figure)


def routing() -> None:
    """CPU time of choosing a replica in the load balancer, by number of replicas."""
    from deploy.replicas import ranked

    say("\n| replicas | microseconds to rank them for a key |\n| --- | --- |")
    for devices in DEVICES:
        numbers, times = list(range(devices)), 200
        rounds = []
        for _ in range(5):
            begun = time.perf_counter()
            for turn in range(times):
                ranked(f"key {turn}", numbers)
            rounds.append((time.perf_counter() - begun) / times * 1e6)
        say(f"| {devices:,} | {statistics.median(rounds):.0f} |")


def main() -> None:
    """Simulate, print the tables, draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few simulated seconds, to try the script itself")
    short = parser.parse_args().short
    seconds = {1: 60.0, 10: 10.0, 1000: 1.0} if short else {1: 1000.0, 10: 100.0, 1000: 5.0}
    say(f"one picture alone {ALONE:.3f} s, {GROUP} together {TOGETHER:.3f} s: {RATE:.1f} a second from each device\n")
    utilisation(seconds)
    hit_rates(seconds)
    crowds(seconds)
    routing()


if __name__ == "__main__":
    main()
