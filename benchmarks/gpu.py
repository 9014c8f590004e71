"""Measures full-size SDXL and FLUX.1-schnell with random weights on one accelerator, through the server's families.

    python -m benchmarks.gpu --device cuda --out gpu.md          everything, some minutes on a large card
    python -m benchmarks.gpu --device cpu --tiny --out tiny.md   the same path with the embedded models

Needs no network; `scripts/collect_wheels.sh` fetches what a bare machine with PyTorch lacks. torch's own counter counts
the operations of one image; the limit is what a large bf16 matrix product reaches on the same card in the same run.
Results are written immediately, and sections skipped for lack of time (`--seconds`) are named.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import EMBEDDED, random_pipeline, write_configurations
from benchmarks.tables import table
from stable_diffusion_server.engine import Engine, EngineState
from stable_diffusion_server.pipelines import MODELS, REAL_MODELS, ModelSpec, with_lcm
from stable_diffusion_server.pipelines.acceleration.apply import PRESETS, apply_optimizations
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.families.flux import Flux
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.components import load_pipeline
from stable_diffusion_server.pipelines.loading.footprint import bytes_of
from stable_diffusion_server.pipelines.loading.loader import COMPUTED_FAST
from stable_diffusion_server.pipelines.loading.offload import apply_residency
from stable_diffusion_server.pipelines.loading.placement import CONTROL, Quantization, Residency
from stable_diffusion_server.pipelines.loading.quantization import quantize_parts
from stable_diffusion_server.pipelines.registry import LoadedFamily, LoadedModelInfo, Registry
from stable_diffusion_server.types import DiffusionRequest, Task

PROMPT = "a red circle on a blue background"
KINDS = {"sdxl": Sdxl, "flux": Flux}
TABLES = ("speeds", "stages", "together", "served", "memory", "placements")
STEPS = 4
HELD = (Quantization.NONE, Quantization.INT8, Quantization.FLOAT8, Quantization.TORCHAO_FLOAT8_DYNAMIC)
# A measurement is not repeated after this many seconds in total.
ENOUGH = 0.8


@dataclass
class Rig:
    """One model to measure, and how to create it; `sides` of square images in pixels, the largest first."""

    facts: ModelSpec
    make: Callable[[], Any]
    device: torch.device
    sides: tuple[int, ...]
    rounds: int = 3
    batches: tuple[int, ...] = (1, 2, 4, 8)
    operations: dict[int, float] = field(default_factory=dict)
    plain: dict[int, Any] = field(default_factory=dict)

    def family(self, performance: str = "off", quantization: Quantization = Quantization.NONE) -> Any:
        """The family on a new pipeline, with the same weights every time."""
        torch.manual_seed(0)
        pipeline = self.make()
        quantize_parts(
            [getattr(pipeline, name) for name in self.facts.quantizable_parts if name != CONTROL],
            quantization,
            self.device,
        )
        apply_optimizations(pipeline, None, self.device, performance)
        return KINDS[self.facts.name](pipeline, self.facts)

    def job(self, side: int, seed: int = 0) -> DiffusionRequest:
        """A text-to-image request without guidance, as for a distilled model."""
        return DiffusionRequest(
            task=Task.TEXT_TO_IMAGE,
            model=self.facts.name,
            revision=self.facts.revision,
            prompt=PROMPT,
            negative_prompt=None,
            width=side,
            height=side,
            seed=seed,
            num_inference_steps=STEPS,
            guidance_scale=self.facts.default_guidance if self.facts.name == "flux" else 1.0,
            scheduler=self.facts.default_scheduler,
        )


class Report:
    """Sections of Markdown, written to a file immediately, within a time limit in seconds."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end, self._lines = path, time.perf_counter() + seconds, list[str]()

    def say(self, *lines: str) -> None:
        """Append lines."""
        print("\n".join(lines), flush=True)  # noqa: T201  # its output
        self._lines += lines
        self._path.write_text("\n".join(self._lines) + "\n")

    def section(self, title: str, columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
        """Write a table, or a sentence if no time is left or the measurement fails."""
        began = time.perf_counter()
        if began > self._end:
            self.say(f"{title}: left out for lack of time.", "")
            return
        self.say(title, "", *table(columns, ()))
        try:
            for row in rows:
                self.say(*table((), [row])[2:])
        except Exception as error:  # report the failure and continue
            self.say(f"failed: {type(error).__name__}: {str(error)[:300]}")
        self.say("", f"({time.perf_counter() - began:.0f} s)", "")


def main() -> None:
    """Measure every model and write one Markdown file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the embedded models, to try the script itself")
    parser.add_argument("--models", nargs="+", default=["sdxl", "flux"], choices=list(KINDS))
    parser.add_argument("--levels", nargs="+", default=list(PRESETS), help="values of PERFORMANCE; the last one serves")
    parser.add_argument("--sides", nargs="+", type=int, help="sides of the squares in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], help="pictures drawn together")
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3600, help="no table is begun after so many")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device, report = torch.device(given.device), Report(given.out, given.seconds)
    peak = matrix_rate(device)
    report.say(f"# {machine(device)}", "", f"A bf16 matrix product reaches {peak / 1e12:.1f} TFLOP/s here.", "")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            rig = rig_for(name, device, Path(folder), tiny=given.tiny)
            rig = replace(rig, rounds=given.rounds, sides=tuple(given.sides or rig.sides), batches=tuple(given.batches))
            report.say(f"## {name}, {STEPS} steps, {rig.facts.default_scheduler}", "")
            measure(rig, given.levels, given.tables, peak, report)


def measure(rig: Rig, levels: Sequence[str], tables: Sequence[str], peak: float, report: Report) -> None:
    """Write all tables of a model."""
    speed = ("side", "batch", "s/picture", "pictures/s", "share of the limit", "PSNR to plain", "s until the first")
    stage = ("side", "text encoders", "their share", "the rest of prepare", "one step", "decode", "decode's share")
    for level in levels:
        family = rig.family(level)
        if "speeds" in tables:
            report.section(f"PERFORMANCE={level}, seconds a picture", speed, speeds(rig, family, peak))
        if "stages" in tables:
            report.section(f"PERFORMANCE={level}, seconds of one picture's stages", stage, stages(rig, family))
        if level == levels[-1]:
            if "together" in tables:
                title = f"PERFORMANCE={level}, eight orders at once through the engine"
                report.section(title, ("side", "most at once", "s for eight", "pictures/s"), together(rig, family))
            if "served" in tables:
                title = f"PERFORMANCE={level}, lone orders over HTTP with a local bucket, seconds"
                report.section(title, ("side", "format", *SERVED), served(rig, family))
        del family
        free(rig.device)
    if "memory" in tables:
        columns = ("QUANTIZE", "PERFORMANCE", "GB of weights", "GB at the worst moment", "s/picture", "PSNR")
        report.section(f"Memory by weights, side {rig.sides[0]}", columns, memory(rig, levels[-1]))
    if "placements" in tables:
        columns = ("placement", "s/picture", "GB at the worst moment")
        report.section(f"Memory by placement, side {rig.sides[-1]}", columns, placements(rig))


def rig_for(name: str, device: torch.device, folder: Path, *, tiny: bool) -> Rig:
    """The model at full size with random weights, or the embedded one."""
    if tiny:
        facts = MODELS[name]
        return Rig(facts, lambda: load_pipeline(facts, EMBEDDED, device), device, (256, 128))
    facts = with_lcm(REAL_MODELS[name][-1])
    write_configurations(folder, facts)
    return Rig(facts, lambda: random_pipeline(facts, folder, device)[0], device, (1024, 512))


def machine(device: torch.device) -> str:
    """Device and versions, for the heading."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return f"{where}, PyTorch {torch.__version__}, diffusers {diffusers.__version__}, {time.strftime('%Y-%m-%d')}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device, *, reset: bool = True) -> None:
    """Free the memory of the last table, and compiled code if `reset` is set."""
    gc.collect()
    if reset:
        torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large square bf16 product, the median of ten."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / median(lambda: left @ right, device, 10)


def median(work: Callable[[], object], device: torch.device, rounds: int, *, warm: bool = False) -> float:
    """Median seconds of one run, after one warm-up run unless `warm`. Slow work gets fewer rounds."""
    if not warm:
        work()
    seconds: list[float] = []
    while len(seconds) < rounds and sum(seconds) < ENOUGH:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def draw(family: Any, jobs: Sequence[DiffusionRequest]) -> list[Any]:
    """Run requests of one shape as a batch; returns their pixels."""
    states = [family.prepare(job) for job in jobs]
    while not states[0].done:
        family.step(states)
    return [family.finish(state).pixels for state in states]


def psnr(one: Any, other: Any) -> float:
    """PSNR in dB of two uint8 images."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def speeds(rig: Rig, family: Any, peak: float) -> Iterator[tuple[Any, ...]]:
    """Seconds per image by size and batch, with the share of the limit and the PSNR against the unoptimized image."""
    for side in rig.sides:
        for batch in rig.batches:
            jobs = [rig.job(side, seed) for seed in range(batch)]
            started = time.perf_counter()
            pictures = draw(family, jobs)
            first = time.perf_counter() - started
            likeness = psnr(pictures[0], rig.plain.setdefault(side, pictures[0]))
            if side not in rig.operations:
                rig.operations[side] = count_operations(family, jobs[0])
            seconds = median(partial(draw, family, jobs), rig.device, rig.rounds, warm=True) / batch
            share = rig.operations[side] / peak / seconds
            cells = (f"{seconds:.4f}", f"{1 / seconds:.2f}", f"{share:.0%}", f"{likeness:.1f}", f"{first:.1f}")
            yield side, batch, *cells


def count_operations(family: Any, job: DiffusionRequest) -> float:
    """FLOP of one whole image: encoders, all steps, decoder. Call this before anything is recorded or compiled."""
    kept, family.prompt_cache = family.prompt_cache, PromptCache(0)
    with FlopCounterMode(display=False) as counter:
        draw(family, [job])
    family.prompt_cache = kept
    return float(counter.get_total_flops())


def stages(rig: Rig, family: Any) -> Iterator[tuple[Any, ...]]:
    """Seconds of each stage of one image."""

    def begin(job: DiffusionRequest) -> None:
        family.step([family.prepare(job)])

    for side in rig.sides:
        job = rig.job(side)
        prepare = median(partial(family.prepare, job), rig.device, rig.rounds)
        kept, family.prompt_cache = family.prompt_cache, PromptCache(0)
        encoders = median(partial(family.prepare, job), rig.device, rig.rounds) - prepare
        family.prompt_cache = kept
        step = median(partial(begin, job), rig.device, rig.rounds) - prepare
        decode = median(partial(family.finish, family.prepare(job)), rig.device, rig.rounds)
        whole = encoders + prepare + STEPS * step + decode
        cells = (f"{prepare:.4f}", f"{step:.4f}", f"{decode:.4f}", f"{decode / whole:.0%}")
        yield side, f"{encoders:.4f}", f"{encoders / whole:.0%}", *cells


def memory(rig: Rig, fastest: str) -> Iterator[tuple[Any, ...]]:
    """Bytes of the weights, and peak bytes during an image, by quantization.

    As in the server, only float8 products are optimized in other ways than by their type.
    """
    plain = None
    for quantization in HELD:
        level = fastest if quantization in COMPUTED_FAST and quantization is not Quantization.NONE else "off"
        try:
            family = rig.family(level, quantization)
            job = rig.job(rig.sides[0])
            draw(family, [job])  # compiling and recording take memory once
            free(rig.device, reset=False)
            picture = draw(family, [job])[0]
            seconds = median(partial(draw, family, [job]), rig.device, rig.rounds)
        except Exception as error:  # a package may lack a kernel for this card; the table shows it
            yield quantization, level, f"failed: {type(error).__name__}: {str(error)[:100]}", "", "", ""
            continue
        plain = picture if plain is None else plain
        parts = [part for part in family.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        likeness = f"{psnr(picture, plain):.1f}"
        yield quantization, level, f"{bytes_of(*parts) / 1e9:.3f}", worst(rig.device), f"{seconds:.4f}", likeness
        del family, parts
        free(rig.device)


def placements(rig: Rig) -> Iterator[tuple[Any, ...]]:
    """Seconds and peak memory by residency; a CPU has only one."""
    for residency in Residency if rig.device.type == "cuda" else (Residency.RESIDENT,):
        torch.manual_seed(0)
        pipeline = rig.make()
        try:
            pipeline.to("cpu")
            free(rig.device)
            apply_residency(pipeline, None, rig.device, residency)
            family = KINDS[rig.facts.name](pipeline, rig.facts)
            seconds = median(partial(draw, family, [rig.job(rig.sides[-1])]), rig.device, 1)
        except Exception as error:  # a hook may not support this card; the table shows it
            yield residency, f"failed: {type(error).__name__}", ""
            continue
        yield residency, f"{seconds:.4f}", worst(rig.device)
        del family, pipeline
        free(rig.device)


def worst(device: torch.device) -> str:
    """Peak GB since the last `free`, formatted."""
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "not counted"


def together(rig: Rig, family: Any) -> Iterator[tuple[Any, ...]]:
    """Eight concurrent images through the engine, with and without step batching."""
    for side in rig.sides:
        for most in (1, 8):
            with engine_over(rig, family, most) as submit:
                seconds = [eight(rig, side, submit, turn) for turn in range(rig.rounds + 1)][1:]
            middle = statistics.median(seconds)
            yield side, most, f"{middle:.3f}", f"{8 / middle:.2f}"


def eight(rig: Rig, side: int, submit: Callable[[DiffusionRequest], Any], turn: int) -> float:
    """Seconds until eight concurrent requests are finished."""
    started = time.perf_counter()
    tickets = [submit(rig.job(side, 8 * turn + seed)) for seed in range(8)]
    for ticket in tickets:
        ticket.result.result(600)
    return time.perf_counter() - started


def registry_of(rig: Rig, family: Any) -> Registry:
    """A registry with one family, for the engine."""
    facts = rig.facts
    info = LoadedModelInfo(
        facts.name, facts.folder, facts.revision, str(rig.device), "half", "resident", "none", 0, False, ()
    )
    return Registry([LoadedFamily(family, facts, info)])


@contextmanager
def engine_over(rig: Rig, family: Any, most: int) -> Iterator[Callable[[DiffusionRequest], Any]]:
    """Run an engine with one family on its own thread; yields its `submit`."""
    ready = threading.Event()
    models = registry_of(rig, family)
    engine: Engine[Any] = Engine(lambda: models, queue_limit=64, max_batch=most, on_ready=ready.set)
    engine.start()
    while not ready.wait(0.1) and engine.state is not EngineState.FAILED:
        pass
    try:
        yield engine.submit
    finally:
        engine.stop(60)


SERVED = ("whole", "the model alone", "beyond it", "encode", "store", "queue")


def served(rig: Rig, family: Any) -> Iterator[tuple[Any, ...]]:
    """The whole server in this process, requested over loopback; each request has a prompt of its own."""
    for side in rig.sides:
        alone = median(partial(afresh, rig, family, side), rig.device, 2 * rig.rounds)
        for kind in ("webp", "jpeg"):
            with serving(rig, family) as ask:
                answers = [ask(side, kind, turn) for turn in range(2 * rig.rounds + 1)][1:]
            whole = statistics.median(seconds for seconds, _ in answers)
            names = ("encode", "store", "queue")
            parts = [statistics.median(timings.get(name, 0.0) for _, timings in answers) for name in names]
            yield side, kind, *(f"{seconds:.4f}" for seconds in (whole, alone, whole - alone, *parts))


def afresh(rig: Rig, family: Any, side: int) -> None:
    """Generate an image whose prompt is not cached."""
    kept, family.prompt_cache = family.prompt_cache, PromptCache(0)
    draw(family, [rig.job(side)])
    family.prompt_cache = kept


@contextmanager
def serving(rig: Rig, family: Any) -> Iterator[Callable[[str, int, int], tuple[float, dict[str, float]]]]:
    """Run a server on a family; yields a function that requests an image and returns its seconds and timings."""
    import httpx  # the server's dependencies may be missing if only the model is measured
    import uvicorn

    from benchmarks.loopback import free_port, wait_for
    from stable_diffusion_server.app import create_app
    from stable_diffusion_server.settings import Settings

    name, facts = rig.facts.name, rig.facts
    models = registry_of(rig, family)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models" / facts.folder).mkdir(parents=True)
        settings = Settings(
            models="local" if facts.repo else "embedded",
            models_dir=Path(folder) / "models",
            load_lcm_lora=bool(facts.builtin_loras),
            text_to_image_model=name,
            data_dir=Path(folder) / "data",
            local_bucket_dir=Path(folder) / "bucket",
            storage_provider="local",
            bumpy_retries="0",  # random weights generate noise
            ui=False,
            log_level="error",
        )
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(create_app(settings, lambda _: models), port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                wait_for(client)

                def ask(side: int, kind: str, turn: int) -> tuple[float, dict[str, float]]:
                    size = {"width": side, "height": side, "num_inference_steps": STEPS}
                    order = {"prompt": f"{PROMPT}, number {turn}", "format": kind, "guidance_scale": 1.0, **size}
                    if name == "flux":
                        del order["guidance_scale"]
                    started = time.perf_counter()
                    answer = client.post("/create_and_upload_image", json=order)
                    seconds = time.perf_counter() - started
                    if answer.status_code != 200:
                        raise SystemExit(answer.text)
                    return seconds, answer.json()["timings"]

                yield ask
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
