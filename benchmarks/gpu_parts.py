"""Measures optimizations of the components of full-size models on an accelerator, one after the other.

    python -m benchmarks.gpu_parts --out parts.md                          SDXL and FLUX.1-schnell, random weights
    python -m benchmarks.gpu_parts --out parts.md --device cpu --tiny      the script itself, with the embedded models

One pass of the denoiser, one decoding, the text encoders, and attention alone, at 1024². Each change is added to those
before it unless its name says otherwise. A failed change is reported in its row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import KINDS, Rig, free, machine, matrix_rate, median, rig_for
from stable_diffusion_server.pipelines.acceleration.cuda_graphs import CudaGraphRunner
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache

Change = tuple[str, Callable[[Any], object]]


class Report:
    """Lines written to a file immediately, since the machine may be taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self.started = time.perf_counter()

    def say(self, *lines: str) -> None:
        """Append lines."""
        for line in lines:
            print(f"[{time.perf_counter() - self.started:5.0f} s] {line}", flush=True)  # noqa: T201  # its output
        self.lines += lines
        self.path.write_text("\n".join(self.lines) + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--models", nargs="+", default=["sdxl", "flux"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device, report = torch.device(given.device), Report(given.out)
    report.say(f"# {machine(device)}", "", f"bf16 product: {matrix_rate(device) / 1e12:.1f} TFLOP/s", "")
    report.say(*attention(device, given.rounds, tiny=given.tiny), "")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            rig = rig_for(name, device, Path(folder), tiny=given.tiny)
            torch.manual_seed(0)
            began = time.perf_counter()
            pipeline = rig.make()
            report.say(f"## {name}: made in {time.perf_counter() - began:.0f} s", "")
            with torch.inference_mode():
                measure(pipeline, rig, given.rounds, report)
            del pipeline
            free(device)


def attention(device: torch.device, rounds: int, *, tiny: bool) -> Iterator[str]:
    """Time each attention kernel at the models' shapes."""
    shapes = {"Flux, 4352 tokens": (1, 24, 4352, 4352, 128), "SDXL, 4096 tokens": (1, 10, 4096, 4096, 64)}
    shapes["SDXL, 1024 tokens"] = (1, 20, 1024, 1024, 64)
    shapes["SDXL, 4096 tokens to 77"] = (1, 10, 4096, 77, 64)
    yield "| attention | kernel | ms | TFLOP/s |"
    yield "| --- | --- | --- | --- |"
    for name, (rows, heads, queries, keys, width) in shapes.items():
        if tiny:
            queries, keys = queries // 16, max(keys // 16, 8)
        q = torch.randn(rows, heads, queries, width, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(rows, heads, keys, width, device=device, dtype=torch.bfloat16) for _ in range(2))
        for kernel in (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

            def work(q: Any = q, k: Any = k, v: Any = v) -> None:
                for _ in range(10):
                    functional.scaled_dot_product_attention(q, k, v)

            try:
                if kernel is None:
                    seconds = median(work, device, rounds) / 10
                else:
                    with sdpa_kernel(kernel):
                        seconds = median(work, device, rounds) / 10
            except RuntimeError as error:
                yield f"| {name} | {kernel} | failed: {type(error).__name__} | |"
                continue
            rate = 4 * rows * heads * queries * keys * width / seconds / 1e12
            yield f"| {name} | {kernel or 'chosen by PyTorch'} | {1000 * seconds:.3f} | {rate:.0f} |"


def measure(pipeline: Any, rig: Rig, rounds: int, report: Report) -> None:
    """Measure all components of one model."""
    family = KINDS[rig.facts.name](pipeline, rig.facts, prompt_cache=PromptCache(0))
    side = rig.sides[-1]
    report.say("| part | change | ms of one | ms of four, each | seconds to begin | difference |")
    report.say("| --- | --- | --- | --- | --- | --- |")
    for row in encoders(family, rig.job(side), rig, rounds):
        report.say(row)
    states = [family.prepare(rig.job(side, seed)) for seed in range(4)]
    for row in decoders(family, states, rig, rounds):
        report.say(row)
    for row in denoisers(family, states, rig, rounds):
        report.say(row)
    for row in pictures(family, rig, rounds):
        report.say(row)
    report.say("")


def encoders(family: Any, job: Any, rig: Rig, rounds: int) -> Iterator[str]:
    """Both text encoders, unchanged and as CUDA graphs."""
    pipe = family.pipeline
    plain = family._encode(job).embeds.clone()
    yield _row("encoders", "none", median(lambda: family._encode(job), rig.device, rounds), None, 0, 0)
    if rig.device.type == "cuda":
        began = time.perf_counter()
        for part in (pipe.text_encoder, pipe.text_encoder_2):
            part.forward = CudaGraphRunner(part.forward)
        for _ in range(3):
            family._encode(job)
        begin = time.perf_counter() - began
        seconds = median(lambda: family._encode(job), rig.device, rounds)
        yield _row("encoders", "graphs", seconds, None, begin, _off(family._encode(job).embeds, plain))


def decoders(family: Any, states: Sequence[Any], rig: Rig, rounds: int) -> Iterator[str]:
    """The VAE's decoder."""
    vae = family.pipeline.vae

    def decode(rows: int) -> torch.Tensor:
        latents = torch.cat([family._unscaled(state, state.latents) for state in states[:rows]])
        pixels: torch.Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return pixels

    changes: list[Change] = [("none", lambda vae: None)]
    if vae.dtype == torch.float32:
        changes.append(("TF32", lambda vae: _allow_tf32()))
        changes.append(("fp32 channels last", lambda vae: vae.to(memory_format=torch.channels_last)))
        changes.append(("bf16 channels last", lambda vae: vae.to(torch.bfloat16)))
    else:
        changes.append(("channels last", lambda vae: vae.to(memory_format=torch.channels_last)))
    if rig.facts.name == "sdxl":
        changes.append(("compiled", lambda vae: vae.decoder.compile()))
    plain = decode(1)
    for name, change in changes:
        yield _measured("decode", name, partial(change, vae), decode, plain, rig, rounds, 1)
    yield _timed("finish", "all of it", lambda: family.finish(states[0]), rig, rounds)


def denoisers(family: Any, states: Sequence[Any], rig: Rig, rounds: int) -> Iterator[str]:
    """One pass of the UNet or the transformer, for one image and for four."""
    pipe = family.pipeline
    name = "unet" if rig.facts.name == "sdxl" else "transformer"
    module = getattr(pipe, name)
    own, calls = module.forward, dict[int, Any]()

    def recorded(rows: int) -> Any:
        """The arguments of a step of that many rows, captured from the family."""
        if rows not in calls:

            def catch(*args: Any, **kwargs: Any) -> Any:
                calls[rows] = (args, kwargs)
                raise InterruptedError

            module.forward = catch
            with suppress(InterruptedError):
                family.step(states[:rows])
            module.forward = own
        return calls[rows]

    for rows in (1, 4):
        recorded(rows)

    def forward(rows: int) -> torch.Tensor:
        args, kwargs = calls[rows]
        predicted: torch.Tensor = module(*args, **kwargs)[0]
        return predicted

    def graphed(module: Any) -> None:
        module.forward = CudaGraphRunner(module.forward)

    def plain_again(module: Any) -> None:
        module.forward = own

    def whole(module: Any) -> None:
        for part in module.modules():
            part._compiled_call_impl = None
        torch._dynamo.reset()
        module.forward = torch.compile(own)

    def cudnn_first(module: Any) -> None:
        module.set_attention_backend("_native_cudnn")

    cuda = rig.device.type == "cuda"
    changes: list[tuple[str, Callable[[Any], object], int]] = [("none", lambda module: None, 4)]
    if cuda:
        changes.append(("graphs", graphed, 4))
    if name == "unet":
        changes.append(("channels last", lambda m: (plain_again(m), m.to(memory_format=torch.channels_last)), 4))
        if cuda:
            changes.append(("channels last, graphs", graphed, 4))
    changes.append(("blocks compiled", lambda m: (plain_again(m), m.compile_repeated_blocks()), 4 * (name == "unet")))
    if cuda:
        changes.append(("blocks compiled, graphs", graphed, 4))
    if name == "unet":
        changes.append(("compiled whole", whole, 1))
        if cuda:
            changes.append(("compiled whole, graphs", graphed, 1))
    elif cuda:
        changes.append(("blocks compiled, cuDNN's attention", lambda m: (plain_again(m), cudnn_first(m)), 1))
        changes.append(("the same with float8 products, by torchao", _float8, 4))
    plain = forward(1)
    for change_name, change, most in changes:
        yield _measured("one step", change_name, partial(change, module), forward, plain, rig, rounds, most)


def pictures(family: Any, rig: Rig, rounds: int) -> Iterator[str]:
    """A whole image with the last changes, with and without waiting for the device after each step."""
    job = rig.job(rig.sides[-1])

    def drawn(*, wait: bool) -> None:
        state = family.prepare(job)
        while not state.done:
            family.step([state])
            if wait and rig.device.type == "cuda":
                torch.cuda.synchronize()
        family.finish(state)

    for wait in (False, True):
        name = "waiting for each step" if wait else "not waiting"
        yield _timed("picture", name, partial(drawn, wait=wait), rig, rounds)


def _measured(
    part: str,
    name: str,
    change: Callable[[], object],
    work: Callable[[int], torch.Tensor],
    plain: torch.Tensor,
    rig: Rig,
    rounds: int,
    most: int,
) -> str:
    # `most` of 0 or 1: only one row at a time
    try:
        began = time.perf_counter()
        change()
        for _ in range(3):
            made = work(1)
        if rig.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter() - began
        one = median(lambda: work(1), rig.device, rounds)
        for _ in range(3 if most > 1 else 0):
            work(most)
        four = median(lambda: work(most), rig.device, rounds) / most if most > 1 else None
        return _row(part, name, one, four, begin, _off(made, plain))
    except Exception as error:  # report the failure and try the next change
        return f"| {part} | {name} | failed: {type(error).__name__}: {str(error)[:150]} | | | |"


def _timed(part: str, name: str, work: Callable[[], object], rig: Rig, rounds: int) -> str:
    try:
        return _row(part, name, median(work, rig.device, rounds), None, 0, 0)
    except Exception as error:  # as in _measured
        return f"| {part} | {name} | failed: {type(error).__name__}: {str(error)[:150]} | | | |"


def _row(part: str, name: str, one: float, four: float | None, begin: float, off: float) -> str:
    cells = (f"{1000 * one:.2f}", "" if four is None else f"{1000 * four:.2f}", f"{begin:.1f}", f"{off:.1e}")
    return f"| {part} | {name} | {' | '.join(cells)} |"


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The relative difference of two tensors in the Frobenius norm."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def _allow_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def _float8(module: Any) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def large(layer: Any, name: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and "blocks" in name and layer.in_features >= 1024

    quantize_(module, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=large)


if __name__ == "__main__":
    main()
