"""Three models with memory for two: what switches cost, how long requests wait, and whether memory grows.

    python benchmarks/model_switching.py [--switches 100]

Uses small SDXL checkpoints with random weights and the original key names, which the script writes first.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import structlog
import tables

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "pipelines")]

from checkpoint_stand_ins import sdxl_pipeline, write  # noqa: E402  # after the path to the stand-ins
from drawing import job_for  # noqa: E402  # after the path to the stand-ins
from original_names import sdxl_tensors  # noqa: E402  # after the path to the stand-ins
from single_file_specs import sdxl_spec  # noqa: E402  # after the path to the stand-ins

from stable_diffusion_server.engine import Engine, EngineState  # noqa: E402  # after the path to the stand-ins
from stable_diffusion_server.errors import ModelLoadError  # noqa: E402  # after the path to the stand-ins
from stable_diffusion_server.pipelines.registry import LoadOptions, Registry, load  # noqa: E402  # after the path to the stand-ins

NAMES = ("a", "b", "c")
BROKEN = "broken"
REQUESTS, SEEDS, STEPS = 60, 6, 2
ARRIVAL_SECONDS = 0.05
Row = tuple[str, object]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--switches", type=int, default=100)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print("\n".join([tables.machine(), "", "| what | measured |", "| --- | --- |"]), flush=True)  # noqa: T201  # its output
    with tempfile.TemporaryDirectory() as place:
        for what, value in measured(Path(place), options.switches):
            print(f"| {what} | {value} |", flush=True)  # noqa: T201  # its output


def measured(folder: Path, switches: int) -> Iterator[Row]:
    """Measure one thing after the other."""
    size, both = write_checkpoints(folder)
    yield "bytes of one model, MB", f"{size / 1e6:.0f}"
    yield "bytes of `a` and `b`, which share VAE and text encoders, MB", f"{both / 1e6:.0f} of {2 * size / 1e6:.0f}"
    alone = SingleRuns(folder)
    for patience in (0.5, 5.0, 60.0):
        yield from mixed(folder, size, alone, patience, disturbed=False)
    yield from mixed(folder, size, alone, 0.5, disturbed=True)
    yield from switch_times(folder, size)
    yield from growth(folder, size, switches)


def write_checkpoints(folder: Path) -> tuple[int, int]:
    """Write the files; return the bytes of one model in memory, and of `a` and `b` together."""
    pipelines = {name: sdxl_pipeline(seed) for seed, name in enumerate(NAMES, 1)}
    for part in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipelines["b"], part).load_state_dict(getattr(pipelines["a"], part).state_dict())
    for name, pipeline in pipelines.items():
        write(folder / f"{name}.safetensors", sdxl_tensors(pipeline))
    (folder / f"{BROKEN}.safetensors").write_bytes((folder / "c.safetensors").read_bytes()[:500_000])
    registry = registry_of(folder)
    registry.load("a", (), lambda share: None)
    one = registry.residents.bytes_used()
    registry.load("b", (), lambda share: None)
    return one, registry.residents.bytes_used()


def registry_of(folder: Path, **options: Any) -> Registry:
    """Return a registry of all checkpoints, none of them loaded."""
    names = (*NAMES, BROKEN)
    specs = {name: replace(sdxl_spec(("denoiser", f"{name}.safetensors")), name=name) for name in names}
    return load(folder, "cpu", 1, LoadOptions(models=specs, on_demand=names, **options))


class SingleRuns:
    """The requests, and what each draws when it runs alone: uint8 pixels by model and seed."""

    def __init__(self, folder: Path) -> None:
        registry = registry_of(folder)
        self.requests: dict[tuple[str, int], Any] = {}
        self.pixels: dict[tuple[str, int], Any] = {}
        for name in NAMES:
            registry.load(name, (), lambda share: None)
            for seed in range(SEEDS):
                self.requests[name, seed] = request_of(registry, name, seed)
                self.pixels[name, seed] = drawn(registry, self.requests[name, seed])

    def is_right(self, pick: tuple[str, int], pixels: Any) -> bool:
        """Whether a picture is that of its single run, and of no other model."""
        near = np.abs(pixels.astype(int) - self.pixels[pick]).max() <= 2
        others = [other for (name, _), other in self.pixels.items() if name != pick[0]]
        return bool(near and all(np.abs(pixels.astype(int) - other).max() > 20 for other in others))


def request_of(registry: Registry, model: str, seed: int) -> Any:
    """Return a request for a loaded model."""
    job = job_for("sdxl", seed=seed, num_inference_steps=STEPS, guidance_scale=3.0, width=64, height=64)
    return replace(job, model=model, revision=registry.residents[model].spec.revision, prompt=f"{model} {seed % 3}")


def drawn(registry: Registry, request: Any) -> Any:
    """Return the pixels of a request that runs alone."""
    state = registry.prepare(request)
    while not state.done:
        registry.step([state])
    return registry.finish(state).pixels


def mixed(folder: Path, size: int, alone: SingleRuns, patience: float, *, disturbed: bool) -> list[Row]:
    """Draw 60 requests of three models that arrive one after another; `disturbed` with cancels and a broken model."""
    chance = np.random.default_rng(3)
    picks = [(str(chance.choice(NAMES)), int(chance.integers(SEEDS))) for _ in range(REQUESTS)]
    asked, ended = dict[int, float](), dict[int, float]()
    with running(folder, size, patience) as (engine, loads):
        tickets, broken = [], []
        for number, pick in enumerate(picks):
            asked[number] = time.perf_counter()
            tickets.append(engine.submit(alone.requests[pick]))
            done = partial(ended.setdefault, number)
            tickets[-1].result.add_done_callback(lambda _, done=done: done(time.perf_counter()))
            if disturbed and number % 10 == 9:
                engine.submit(alone.requests[pick]).result.cancel()
                broken.append(engine.submit(replace(alone.requests["a", 0], model=BROKEN)))
            time.sleep(ARRIVAL_SECONDS)
        right = sum(alone.is_right(pick, image_of(ticket.result)) for pick, ticket in zip(picks, tickets, strict=True))
        failures = sum(isinstance(ticket.result.exception(600), ModelLoadError) for ticket in broken)
    overdue = [
        sum(asked[number] + patience < started < ended[number] for started in loads)
        for number in asked
        if ended[number] > asked[number] + patience
    ]
    arrivals = 1 + sum(one[0] != other[0] for one, other in pairwise(picks))
    text = f"patience {patience:g} s" + (", 6 cancels, 6 requests of a broken model" if disturbed else "")
    rows: list[Row] = [
        (f"{text}: pictures equal to their single runs", f"{right} of {REQUESTS}"),
        (f"{text}: loads (changes of model in order of arrival)", f"{len(loads)} ({arrivals})"),
        (f"{text}: longest wait, s", f"{max(ended[number] - asked[number] for number in asked):.1f}"),
        (f"{text}: most loads begun while an overdue request waited (bound)", f"{max(overdue, default=0)} (3)"),
    ]
    if disturbed:
        rows.append((f"{text}: requests of the broken model that failed", f"{failures} of {len(broken)}"))
    return rows


def image_of(result: Future[Any]) -> Any:
    """Wait for a request; return its uint8 pixels."""
    return result.result(600).product.pixels


@contextmanager
def running(folder: Path, size: int, patience: float) -> Iterator[tuple[Engine[Any], list[float]]]:
    """Run an engine with memory for two models; yields it, and when its loads began."""
    registry = registry_of(folder, memory=int(2.2 * size))
    loads: list[float] = []
    inner = registry.load

    def noted(model: str, busy: Any, progress: Callable[[float], None]) -> bool:
        if model != BROKEN:
            loads.append(time.perf_counter())
        return inner(model, busy, progress)

    registry.load = noted  # type: ignore[method-assign]  # counts what the engine does
    engine: Engine[Any] = Engine(lambda: registry, queue_limit=200, max_batch=4, workers=0, switch_patience=patience)
    engine.start()
    try:
        while engine.state is not EngineState.READY:
            time.sleep(0.01)
        yield engine, loads
    finally:
        engine.stop(30)


def switch_times(folder: Path, size: int) -> list[Row]:
    """Time a switch with the file in the page cache and without, as a ratio to one step."""
    registry = registry_of(folder, memory=int(1.2 * size))
    times: dict[str, list[float]] = {"warm": [], "cold": []}
    steps = []
    for number in range(12):
        name, kind = NAMES[number % 3], ("warm", "cold")[number % 2]
        if kind == "cold":
            forget(folder / f"{name}.safetensors")
        started = time.perf_counter()
        registry.load(name, (), lambda share: None)
        times[kind].append(time.perf_counter() - started)
        state = registry.prepare(request_of(registry, name, number))
        started = time.perf_counter()
        registry.step([state])
        steps.append(time.perf_counter() - started)
    step = statistics.median(steps)
    return [
        (
            f"switch from disk, page cache {kind}, s (of a step)",
            f"{statistics.median(values):.2f} ({statistics.median(values) / step:.0f})",
        )
        for kind, values in times.items()
    ]


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def growth(folder: Path, size: int, switches: int) -> list[Row]:
    """Switch many times with memory for one model, a picture after each; compare resident memory."""
    registry = registry_of(folder, memory=int(1.2 * size))
    used = []
    for number in range(switches):
        name = NAMES[number % 3]
        registry.load(name, (), lambda share: None)
        drawn(registry, request_of(registry, name, number % SEEDS))
        used.append(psutil.Process().memory_info().rss)
    tenth = max(1, switches // 10)
    early, late = max(used[tenth : 2 * tenth]), max(used[-tenth:])
    text = f"{early / 1e6:.0f} → {late / 1e6:.0f} MB ({100 * (late / early - 1):+.1f} %)"
    return [(f"resident memory over {switches} switches (second tenth → last tenth)", text)]


if __name__ == "__main__":
    main()
