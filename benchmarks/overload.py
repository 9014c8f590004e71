"""Sends twice as many requests as the server can serve, with sixty-four clients, and reports the outcome.

    python benchmarks/overload.py [minutes] [plot.svg]

Runs the real server with the embedded models. First it measures the capacity; then requests arrive randomly (Poisson)
at twice that rate. A request that finds all 64 clients busy waits for one. An accepted request must return its own,
correct image; any other must be refused with 429 at once. A separate process polls `/healthz` throughout.
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from loopback import say
from PIL import Image
from watching import Watch, asked_for_health, machine, milliseconds, percentile, plotted, serving

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
PLOT = Path(sys.argv[2]) if len(sys.argv) > 2 else None
AT_ONCE, TIMES, CAPACITY_SECONDS = 64, 2.0, min(30.0, 20 * MINUTES)
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
STEPS = 6


@dataclass
class Seen:
    """Outcomes of the requests, and their durations."""

    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    retry_after: list[int] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    by_minute: Counter[int] = field(default_factory=Counter)


async def main() -> None:
    """Start a server in an empty folder, measure, print, stop it."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (url, pid):
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            await drawn_by(client, 8, 5.0, Seen(), 0)  # warm-up
            capacity = Seen()
            seconds = await drawn_by(client, 16, CAPACITY_SECONDS, capacity, 10**6)
            rate = len(capacity.accepted) / seconds
            seen = Seen()
            with Watch(pid) as watch, asked_for_health(url) as health:
                seconds = await arriving(client, TIMES * rate, 60 * MINUTES, seen)
    tell(rate, seconds, seen, watch, health)
    if PLOT is not None:
        shown = {"memory in MB": watch.memory, "descriptors": watch.descriptors, "threads": watch.threads}
        PLOT.write_text(plotted(f"{MINUTES:g} minutes at twice the capacity", watch.at, shown))
    if seen.other:
        raise SystemExit(1)


async def drawn_by(client: httpx.AsyncClient, clients: int, seconds: float, seen: Seen, first: int) -> float:
    """Let some clients send requests one after the other for `seconds`; returns the seconds until the last response."""
    began = time.perf_counter()

    async def one(number: int) -> None:
        while time.perf_counter() - began < seconds:
            await order(client, first + number, seen, began)
            number += clients

    await asyncio.gather(*(one(number) for number in range(clients)))
    return time.perf_counter() - began


async def arriving(client: httpx.AsyncClient, rate: float, seconds: float, seen: Seen) -> float:
    """Send requests at a random (Poisson) rate; returns the seconds until the last response."""
    chance, places = random.Random(3), asyncio.Semaphore(AT_ONCE)  # noqa: S311  # no secret
    began, due, number = time.perf_counter(), 0.0, 2 * 10**6
    under_way: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        try:
            await order(client, number, seen, began)
        finally:
            places.release()

    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        await places.acquire()
        task = asyncio.create_task(one(number))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        number += 1
    await asyncio.gather(*under_way)
    return time.perf_counter() - began


async def order(client: httpx.AsyncClient, number: int, seen: Seen, began: float) -> None:
    """Send one unique request and check its image."""
    colour = COLOURS[number % len(COLOURS)]
    asked = {"prompt": f"a {colour} circle on a white background", "seed": str(number), "model": "sdxl"}
    size = {"width": "128", "height": "128", "num_inference_steps": str(STEPS), "save_path": f"{number}.png"}
    started = time.perf_counter()
    try:
        answer = await client.get("/make_image", params={**asked, **size})
    except httpx.HTTPError as error:
        seen.other[type(error).__name__] += 1
        return
    took = time.perf_counter() - started
    if answer.status_code == 429:
        seen.refused.append(took)
        seen.retry_after.append(int(answer.headers["retry-after"]))
    elif answer.status_code == 200 and f"/{number}.png" in answer.headers["content-location"]:
        with Image.open(io.BytesIO(answer.content)) as image:
            image.load()
            seen.other["a picture of another size"] += image.size != (128, 128)
            seen.other += Counter()  # removes zero counts
        seen.accepted.append(took)
        seen.by_minute[int((time.perf_counter() - began) / 60)] += 1
    else:
        seen.other[f"{answer.status_code} {answer.text[:120]}"] += 1


def tell(rate: float, seconds: float, seen: Seen, watch: Watch, health: list[float]) -> None:
    """Print the table."""
    say(f"{machine()}.\n")
    say("| what | measured |\n| --- | --- |")
    say(f"| capacity, 16 clients one order after the other | {rate:.2f} pictures a second |")
    asked = len(seen.accepted) + len(seen.refused) + seen.other.total()
    say(f"| asked for, over {seconds / 60:.1f} minutes | {asked}, {asked / seconds:.2f} a second |")
    say(f"| accepted, and drawn | {len(seen.accepted)}, {len(seen.accepted) / seconds:.2f} a second |")
    minutes = ", ".join(str(seen.by_minute[minute]) for minute in range(int(MINUTES)))
    say(f"| pictures in each minute | {minutes} |")
    say(f"| refused with 429 | {len(seen.refused)} |")
    say(f"| anything else | {seen.other.total()} {dict(seen.other) or ''} |")
    half, most = percentile(seen.accepted, 0.5), percentile(seen.accepted, 0.99)
    say(f"| seconds of an accepted order: half / 99 % | {half:.2f} / {most:.2f} |")
    say(f"| milliseconds of a refusal: half / 99 % / longest | {milliseconds(seen.refused)} |")
    reported = f"{min(seen.retry_after, default=0)} to {max(seen.retry_after, default=0)}"
    say(f"| `Retry-After` in seconds | {reported} |")
    say(f"| `/healthz` in ms: half / 99 % / longest of {len(health)} | {milliseconds(health)} |")
    for row in watch.reported():
        say(row)
    for what, number in seen.other.most_common():
        say(f"\nNot as it should be, {number} times: {what}")


if __name__ == "__main__":
    asyncio.run(main())
