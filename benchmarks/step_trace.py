"""Traces six jobs of different tasks, lengths and arrival times through shared forward passes; compares the images.

    python -m benchmarks.step_trace [folder for the result]

Runs the embedded SDXL in this process. Each image is then generated alone and compared with the traced one.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stable_diffusion_server.engine import DenoiserCapabilities, Engine, EngineResult, EngineState
from stable_diffusion_server.pipelines import MODELS, registry
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

ROOT = Path(__file__).resolve().parent.parent
SIDE = 128
PROMPT = "a red circle on a blue background"


@dataclass
class Traced(DenoiserCapabilities):
    """A denoiser that records each step: start, duration, and the participating requests with their step numbers."""

    denoiser: Any
    names: dict[int, str] = field(default_factory=dict)
    steps: list[tuple[float, float, dict[str, tuple[int, int]]]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def prepare(self, job: DiffusionRequest) -> Any:
        """Forward to the denoiser."""
        return self.denoiser.prepare(job)

    def step(self, states: Sequence[Any]) -> None:
        """Forward to the denoiser and record the step."""
        began = time.perf_counter()
        self.denoiser.step(states)
        riders = {self.names[state.request.seed]: (state.index, state.steps) for state in states}
        with self.changed:
            self.steps.append((began, time.perf_counter() - began, riders))
            self.changed.notify_all()

    def finish(self, state: Any) -> Any:
        """Forward to the denoiser."""
        return self.denoiser.finish(state)


def main() -> None:
    """Run the jobs together, then alone; compare, write the table."""
    traced = Traced(registry.load(ROOT / "models", "cpu", 0))
    jobs = six_jobs()
    traced.names.update({job.seed: name for name, (job, _) in jobs.items()})
    engine: Engine[Any] = Engine(lambda: traced, queue_limit=16, max_batch=8)
    engine.start()
    while engine.state is not EngineState.READY:
        time.sleep(0.01)
    warm = engine.submit(replace(jobs["A"][0], seed=1_000_000))
    traced.names[1_000_000] = "warm"
    warm.result.result(60)
    traced.steps.clear()
    together, arrivals, origin = draw_together(engine, traced, jobs)
    trace = list(traced.steps)
    alone = {name: engine.submit(job).result.result(60) for name, (job, _) in jobs.items()}
    engine.stop(10)
    text = report(jobs, arrivals, trace, together, alone, origin)
    print(text)  # noqa: T201  # its output
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results"
    (folder / f"{time.strftime('%Y-%m-%d')}-step-trace.md").write_text(text + "\n")


def six_jobs() -> dict[str, tuple[DiffusionRequest, int]]:
    """Jobs by name, each with the number of device steps after which it arrives."""
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (SIDE * 0.3) ** 2
    scene = ImageArray(np.where(inside[..., None], (40, 160, 60), (240, 220, 60)).astype(np.uint8))
    mask = ImageArray((inside * 255).astype(np.uint8))
    rim = inside ^ (np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    edges = ImageArray(((rim & inside) * 255).astype(np.uint8))

    facts = MODELS["sdxl"]
    text, image, inpaint = Task.TEXT_TO_IMAGE, Task.IMAGE_TO_IMAGE, Task.INPAINT

    def job(
        seed: int, task: Task, steps: int, guidance: float = 2.0, scheduler: str = "euler", **more: Any
    ) -> DiffusionRequest:
        return DiffusionRequest(
            task, "sdxl", facts.revision, PROMPT, None, SIDE, SIDE, seed, steps, guidance, scheduler, **more
        )

    return {
        "A": (job(1, text, 12), 0),
        "B": (job(2, text, 4, 1.0), 2),
        "C": (job(3, image, 12, 3.5, image=scene, strength=0.5), 3),
        "D": (job(4, inpaint, 6, 2.0, "euler_a", image=scene, mask=mask), 4),
        "E": (job(5, text, 5, 2.0, "ddim", control=edges, control_scale=0.9), 7),
        "F": (job(6, text, 10, 2.0, refine=True), 9),
    }


def draw_together(
    engine: Engine[Any], traced: Traced, jobs: dict[str, tuple[DiffusionRequest, int]]
) -> tuple[dict[str, EngineResult[Any]], dict[str, float], float]:
    """Submit each job after its number of device steps; returns results, arrivals and the start time."""
    origin, tickets, arrivals = time.perf_counter(), {}, {}
    for name, (job, after) in jobs.items():
        with traced.changed:
            traced.changed.wait_for(lambda after=after: len(traced.steps) >= after, 60)
        arrivals[name] = time.perf_counter()
        tickets[name] = engine.submit(job)
    return {name: ticket.result.result(60) for name, ticket in tickets.items()}, arrivals, origin


def report(
    jobs: dict[str, tuple[DiffusionRequest, int]],
    arrivals: dict[str, float],
    trace: list[tuple[float, float, dict[str, tuple[int, int]]]],
    together: dict[str, EngineResult[Any]],
    alone: dict[str, EngineResult[Any]],
    origin: float,
) -> str:
    """The tables in Markdown."""
    passes, steps = len(trace), sum(len(riders) for _, _, riders in trace)
    lines = [
        "# Six jobs through shared forward passes",
        "",
        f"{time.strftime('%Y-%m-%d')}: `python -m benchmarks.step_trace`, embedded SDXL, {SIDE} × {SIDE} pixels.",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, shared with other work",
        f"(load {os.getloadavg()[0]:.1f}).",
        "",
        f"{steps} steps of six jobs in {passes} forward passes. Times are milliseconds since the first job arrived.",
        "",
        "| job | what | arrived | first pass | last pass | steps | PSNR against the job alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (job, _) in jobs.items():
        numbers = [number for number, (_, _, riders) in enumerate(trace, 1) if name in riders]
        what = f"{job.task.value.replace('_', ' ')}, {job.scheduler}, guidance {job.guidance_scale:g}"
        what += ", refined" * job.refine + ", edges" * (job.control is not None)
        ratio = psnr(together[name].product.pixels, alone[name].product.pixels)
        verdict = "equal" if math.isinf(ratio) else f"{ratio:.1f} dB"
        arrived = 1000 * (arrivals[name] - origin)
        lines.append(f"| {name} | {what} | {arrived:.0f} | {numbers[0]} | {numbers[-1]} | {len(numbers)} | {verdict} |")
        if ratio < 45:
            raise SystemExit(f"{name} is {ratio:.1f} dB from the picture drawn alone")
    lines += ["", f"| pass | at | took | {' | '.join(jobs)} |", f"| --- | --- | --- |{' --- |' * len(jobs)}"]
    for number, (began, seconds, riders) in enumerate(trace, 1):
        cells = [f"{riders[name][0]}/{riders[name][1]}" if name in riders else "" for name in jobs]
        lines.append(f"| {number} | {1000 * (began - origin):.0f} | {1000 * seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """PSNR of two images in dB, infinite for equal ones."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


if __name__ == "__main__":
    main()
