"""Measures model components on one CPU thread: unchanged, channels last, and also with oneDNN.

    python -m benchmarks.cpu_parts [rounds]

The figure is the thread's CPU time, the minimum of several rounds, since other load on the machine only adds time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.loopback import say
from benchmarks.servers import FACTS, ROOT
from benchmarks.tables import machine, table
from stable_diffusion_server.pipelines.acceleration.apply import apply_optimizations
from stable_diffusion_server.pipelines.acceleration.onednn import use_onednn
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.types import DiffusionRequest, Task

CPU = torch.device("cpu")
SIDES, ROWS = (128, 256), (1, 8)


def main() -> None:
    """Measure every variant and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    torch.set_num_threads(1)
    columns = {name: parts(family(name), rounds) for name in ("stock", "channels last", "oneDNN", "both (safe)")}
    rows = [
        (
            part,
            *(f"{1000 * column[part]:.1f}" for column in columns.values()),
            f"{seconds / columns['both (safe)'][part]:.2f}",
        )
        for part, seconds in columns["stock"].items()
    ]
    say("\n".join([machine(), "", *table(("milliseconds", *columns, "stock / safe"), rows)]))


def family(way: str) -> Sdxl:
    """The embedded SDXL with one variant applied."""
    pipeline = load_pipeline(FACTS, ROOT / "models", CPU)
    if way == "channels last":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    elif way == "oneDNN":
        use_onednn(pipeline, None)
    elif way != "stock":
        apply_optimizations(pipeline, None, CPU, "safe")
    return Sdxl(pipeline, FACTS, prompt_cache=PromptCache(0))


def parts(drawing: Any, rounds: int) -> dict[str, float]:
    """Seconds per component, by name."""
    found = {"encode a prompt and prepare": least(lambda: drawing.prepare(job(128, 0)), rounds)}
    for side in SIDES:
        for rows in ROWS:
            jobs = [job(side, n) for n in range(rows)]
            found[f"a step of {rows}, {side} × {side}"] = least(partial(step_of, drawing, jobs), rounds)
        state = drawing.prepare(job(side, 0))
        found[f"decode, {side} × {side}"] = least(partial(drawing.finish, state), rounds)
    return found


def step_of(drawing: Any, jobs: list[DiffusionRequest]) -> Callable[[], None]:
    """One step; preparing the states is not timed."""
    states = [drawing.prepare(job) for job in jobs]
    return lambda: drawing.step(states)


def least(work: Callable[[], Any], rounds: int) -> float:
    """Minimum CPU seconds of this thread. If `work` returns a function, that function is timed."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.thread_time()
        made = work()
        if callable(made):
            began = time.thread_time()
            made()
        seconds.append(time.thread_time() - began)
    return min(seconds[1:])


def job(side: int, seed: int) -> DiffusionRequest:
    """A text-to-image request with guidance."""
    return DiffusionRequest(
        task=Task.TEXT_TO_IMAGE,
        model=FACTS.name,
        revision=FACTS.revision,
        prompt="a red circle on a blue background",
        negative_prompt=None,
        width=side,
        height=side,
        seed=seed,
        num_inference_steps=4,
        guidance_scale=FACTS.default_guidance,
        scheduler=FACTS.default_scheduler,
    )


if __name__ == "__main__":
    main()
