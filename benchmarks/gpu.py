"""Measures full-size SDXL and FLUX.1-schnell with random weights on one accelerator, through the server's own families.

    python -m benchmarks.gpu --device cuda --out gpu.md          everything, a few minutes on a large card
    python -m benchmarks.gpu --device cpu --tiny --out tiny.md   the same path with the embedded models

Needs PyTorch, diffusers and transformers, and no network; `scripts/collect_wheels.sh` fetches what a bare machine with
PyTorch lacks. Operations are counted by torch's own counter in one step; the limit is what a large bf16 matrix
product reaches on the same card in the same run.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import EMBEDDED, random_pipeline, write_configurations
from stable_diffusion_server.engine import Engine
from stable_diffusion_server.engine.contract import Phase
from stable_diffusion_server.orders import Job, Task
from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS, ModelFacts, with_lcm
from stable_diffusion_server.pipelines.components import bytes_of, load_pipeline, settle
from stable_diffusion_server.pipelines.conversion import quantize_parts
from stable_diffusion_server.pipelines.embeddings import Embeddings
from stable_diffusion_server.pipelines.flux import Flux
from stable_diffusion_server.pipelines.performance import Performance, speed_up
from stable_diffusion_server.pipelines.placement import Quantization, Residency
from stable_diffusion_server.pipelines.sdxl import Sdxl

PROMPT = "a red circle on a blue background"
KINDS = {"sdxl": Sdxl, "flux": Flux}
LEVELS: tuple[Performance, ...] = ("off", "safe", "fast")


@dataclass
class Rig:
    """One model ready to be measured, and how to make it anew."""

    facts: ModelFacts
    make: Callable[[], Any]
    device: torch.device
    sides: tuple[int, ...]
    levels: tuple[Performance, ...] = LEVELS

    def family(self, performance: Performance = "off") -> Any:
        """The family over a fresh pipeline with the same weights each time."""
        torch.manual_seed(0)
        pipeline = self.make()
        speed_up(pipeline, None, self.device, performance)
        return KINDS[self.facts.name](pipeline, self.facts)

    def job(self, side: int, seed: int = 0, steps: int = 4) -> Job:
        """A text-to-image job without guidance: what a distilled model draws."""
        return Job(
            task=Task.TEXT_TO_IMAGE,
            model=self.facts.name,
            revision=self.facts.revision,
            prompt=PROMPT,
            negative_prompt=None,
            width=side,
            height=side,
            seed=seed,
            num_inference_steps=steps,
            guidance_scale=self.facts.default_guidance if self.facts.name == "flux" else 1.0,
            scheduler=self.facts.default_scheduler,
        )


def main() -> None:
    """Measure every model and write one Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the embedded models, to try the script itself")
    parser.add_argument("--models", nargs="+", default=["sdxl", "flux"], choices=list(KINDS))
    parser.add_argument("--levels", nargs="+", default=LEVELS, choices=LEVELS, help="fast waits for the compiler")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    peak = matrix_rate(device)
    lines = [f"# {machine(device)}", "", f"A bf16 matrix product reaches {peak / 1e12:.1f} TFLOP/s here.", ""]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            rig = replace(rig_for(name, device, Path(folder), tiny=given.tiny), levels=tuple(given.levels))
            lines += [f"## {name}, 4 steps, {rig.facts.default_scheduler}", ""]
            for table in (speeds, stages, memory, placements, together):
                lines += [*table(rig, given.rounds, peak), ""]
                given.out.write_text("\n".join(lines))  # what was measured stays, whatever the next one does
                free(device)
    print("\n".join(lines))  # noqa: T201  # its output


def rig_for(name: str, device: torch.device, folder: Path, *, tiny: bool) -> Rig:
    """The model at full size with random weights, or the embedded one."""
    if tiny:
        facts = MODELS[name]
        return Rig(facts, lambda: load_pipeline(facts, EMBEDDED, device), device, (128, 256))
    facts = with_lcm(REAL_MODELS[name][-1])
    write_configurations(folder, facts)
    return Rig(facts, lambda: random_pipeline(facts, folder, device)[0], device, (512, 1024))


def machine(device: torch.device) -> str:
    """Device and versions, for the head of the table."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{where}, PyTorch {torch.__version__}, diffusers {diffusers.__version__}, {time.strftime('%Y-%m-%d')}"


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what the last table left."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large square bf16 product, the median of ten."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median(lambda: left @ right, device, 10)


def median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Seconds of one run, after a run to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def draw(family: Any, jobs: Sequence[Job]) -> list[Any]:
    """Draw jobs of one shape together: their pixels."""
    states = [family.prepare(job) for job in jobs]
    while not states[0].done:
        family.step(states)
    return [family.finish(state).pixels for state in states]


def psnr(one: Any, other: Any) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def speeds(rig: Rig, rounds: int, peak: float) -> list[str]:
    """Seconds a picture by size, batch and level, with the share of the limit and the likeness to the plain picture."""
    lines = [
        "| side | batch | level | s/picture | pictures/s | share of the limit | PSNR to plain |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    operations: dict[int, float] = {}
    plain: dict[int, Any] = {}
    for level in rig.levels:
        lines += _speeds_of(rig, level, rounds, peak, operations, plain)
        free(rig.device)
    return lines


def _speeds_of(
    rig: Rig, level: Performance, rounds: int, peak: float, operations: dict[int, float], plain: dict[int, Any]
) -> list[str]:
    family, lines = rig.family(level), []
    for side in rig.sides:
        if side not in operations:
            operations[side] = count_operations(family, rig.job(side))
        picture = draw(family, [rig.job(side)])[0]
        likeness = psnr(picture, plain.setdefault(side, picture))
        for batch in (1, 2, 4, 8):
            jobs = [rig.job(side, seed) for seed in range(batch)]
            seconds = median(partial(draw, family, jobs), rig.device, rounds) / batch
            share = operations[side] / peak / seconds
            cells = (side, batch, level, f"{seconds:.4f}", f"{1 / seconds:.2f}", f"{share:.0%}", f"{likeness:.1f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def count_operations(family: Any, job: Job) -> float:
    """FLOP of one whole picture: encoders, every step, decoder."""
    with FlopCounterMode(display=False) as counter:
        draw(family, [job])
    return float(counter.get_total_flops())


def stages(rig: Rig, rounds: int, peak: float) -> list[str]:
    """Where the time of one picture goes."""
    lines = [
        "| side | level | text encoders | their share | the rest of prepare | one step | decode | decode's share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for level in rig.levels:
        lines += _stages_of(rig, level, rounds)
        free(rig.device)
    return lines


def _stages_of(rig: Rig, level: Performance, rounds: int) -> list[str]:
    family, lines = rig.family(level), []

    def begin(job: Job) -> None:
        family.step([family.prepare(job)])

    for side in rig.sides:
        job = rig.job(side)
        prepare = median(partial(family.prepare, job), rig.device, rounds)
        kept, family.embeddings = family.embeddings, Embeddings(0)
        encoders = median(partial(family.prepare, job), rig.device, rounds) - prepare
        family.embeddings = kept
        step = median(partial(begin, job), rig.device, rounds) - prepare
        decode = median(partial(family.finish, family.prepare(job)), rig.device, rounds)
        whole = encoders + prepare + 4 * step + decode
        cells = (f"{encoders:.4f} | {encoders / whole:.0%} | {prepare:.4f}", f"{step:.4f}", f"{decode:.4f}")
        lines.append(f"| {side} | {level} | {' | '.join(cells)} | {decode / whole:.0%} |")
    return lines


def memory(rig: Rig, rounds: int, peak: float) -> list[str]:
    """Bytes of weights, and at the worst moment of a picture, by what the weights are held in."""
    lines = ["| weights | GB of weights | GB at the worst moment | PSNR |", "| --- | --- | --- | --- |"]
    plain = None
    for quantization in (Quantization.NONE, Quantization.INT8, Quantization.FLOAT8):
        family = rig.family()
        try:
            quantize_parts([getattr(family.pipeline, rig.facts.denoiser)], quantization)
            free(rig.device)
            parts = [part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
            picture = draw(family, [rig.job(rig.sides[0])])[0]
        except Exception as error:  # a package may lack a kernel for this card: the table says so
            lines.append(f"| {quantization} | failed: {type(error).__name__} | | |")
            continue
        plain = picture if plain is None else plain
        worst = torch.cuda.max_memory_allocated(rig.device) / 1e9 if rig.device.type == "cuda" else float("nan")
        lines.append(f"| {quantization} | {bytes_of(*parts) / 1e9:.3f} | {worst:.2f} | {psnr(picture, plain):.1f} |")
        del family
        free(rig.device)
    return lines


def placements(rig: Rig, rounds: int, peak: float) -> list[str]:
    """Seconds and memory at the worst moment by where the weights live; a CPU alone knows one place."""
    lines = ["| placement | s/picture | GB at the worst moment |", "| --- | --- | --- |"]
    for residency in Residency if rig.device.type == "cuda" else (Residency.RESIDENT,):
        torch.manual_seed(0)
        pipeline = rig.make()
        try:
            pipeline.to("cpu")
            free(rig.device)
            settle(pipeline, None, rig.device, residency)
            family = KINDS[rig.facts.name](pipeline, rig.facts)
            seconds = median(partial(draw, family, [rig.job(rig.sides[0])]), rig.device, rounds)
        except Exception as error:  # a hook may lack what this card needs: the table says so
            lines.append(f"| {residency} | failed: {type(error).__name__} | |")
            continue
        worst = torch.cuda.max_memory_allocated(rig.device) / 1e9 if rig.device.type == "cuda" else float("nan")
        lines.append(f"| {residency} | {seconds:.4f} | {worst:.2f} |")
        del family, pipeline
        free(rig.device)
    return lines


def together(rig: Rig, rounds: int, peak: float) -> list[str]:
    """Eight pictures at once through the engine, with step batching and without."""
    lines = ["| side | most at once | s for eight | pictures/s |", "| --- | --- | --- | --- |"]
    for side in rig.sides:
        for most in (1, 8):
            with engine_over(rig, most) as submit:
                seconds = [eight(rig, side, submit, turn) for turn in range(rounds + 1)][1:]
            middle = statistics.median(seconds)
            lines.append(f"| {side} | {most} | {middle:.3f} | {8 / middle:.2f} |")
        free(rig.device)
    return lines


def eight(rig: Rig, side: int, submit: Callable[[Job], Any], turn: int) -> float:
    """Seconds until eight jobs, handed in at once, are drawn."""
    started = time.perf_counter()
    tickets = [submit(rig.job(side, 8 * turn + seed)) for seed in range(8)]
    for ticket in tickets:
        ticket.result.result(600)
    return time.perf_counter() - started


@contextmanager
def engine_over(rig: Rig, most: int) -> Iterator[Callable[[Job], Any]]:
    """An engine with one family on its own thread: the function that hands it a job."""
    ready = threading.Event()
    engine: Engine[Any, Any] = Engine(rig.family, queue_limit=64, max_batch=most, ready=ready.set)
    engine.start()
    while not ready.wait(0.1) and engine.phase is not Phase.FAILED:
        pass
    try:
        yield engine.submit
    finally:
        engine.stop(60)


if __name__ == "__main__":
    main()
