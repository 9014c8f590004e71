"""A batch of eight requests with five sets of LoRAs: against one by one, and against a batch without LoRAs.

Prints a table of ratios, which depend on the machine less than seconds do: `python -m benchmarks.adapters`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.registry import LoadOptions, load
from stable_diffusion_server.types import DiffusionRequest, Task

MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
RANKS = {"a": 4, "b": 8, "c": 16, "d": 32}
SETS: Sequence[tuple[tuple[str, float], ...]] = (
    (("a", 1.0),), (("b", 0.7),), (("c", 1.0), ("d", 0.5)), (("a", 1.0),),
    (("d", -1.0),), (("a", 0.3), ("b", 0.3), ("c", 0.3)), (("b", 0.7),), (("c", 1.0), ("d", 0.5)),
)  # fmt: skip
STEPS, ROUNDS = 8, 3


def files(pipeline: Any, folder: Path) -> None:
    """A LoRA of each rank on the attention and feed-forward layers, every second one on the convolutions too."""
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    for number, (name, rank) in enumerate(RANKS.items()):
        chance, tensors = torch.Generator().manual_seed(number), {}
        for path, layer in getattr(pipeline, part).named_modules():
            convolution = isinstance(layer, torch.nn.Conv2d) and "resnets" in path and number % 2
            if not convolution and not (isinstance(layer, torch.nn.Linear) and ("attn" in path or "ff." in path)):
                continue
            down = torch.randn(rank, *layer.weight.shape[1:], generator=chance) * 0.1 / rank
            up = torch.randn(len(layer.weight), rank, generator=chance)
            tensors[f"{part}.{path}.lora_A.weight"] = down
            tensors[f"{part}.{path}.lora_B.weight"] = up[..., None, None] if convolution else up
        save_file(tensors, folder / f"{name}.safetensors")


def request(model: str, seed: int, loras: tuple[tuple[str, float], ...] = ()) -> DiffusionRequest:
    """A picture of 128 × 128."""
    spec = MODELS[model]
    return DiffusionRequest(
        task=Task.TEXT_TO_IMAGE, model=model, revision="", prompt="a red circle on a blue background",
        negative_prompt=None, width=128, height=128, seed=seed, num_inference_steps=STEPS,
        guidance_scale=spec.default_guidance, scheduler=spec.default_scheduler, loras=loras,
    )  # fmt: skip


def together(registry: Any, requests: Sequence[DiffusionRequest]) -> float:
    """Seconds of all steps in one batch."""
    states = [registry.prepare(one) for one in requests]
    started = time.perf_counter()
    while not states[0].done:
        registry.step(states)
    return time.perf_counter() - started


def one_by_one(registry: Any, requests: Sequence[DiffusionRequest]) -> float:
    """Seconds of all steps, one request after the other."""
    return sum(together(registry, [one]) for one in requests)


def largest_difference(registry: Any, requests: Sequence[DiffusionRequest]) -> int:
    """The largest difference (of 255) between a picture of a batch and the one drawn alone."""
    states = [registry.prepare(one) for one in requests]
    while not states[0].done:
        registry.step(states)
    most = 0
    for state, one in zip(states, requests, strict=True):
        alone = registry.prepare(one)
        while not alone.done:
            registry.step([alone])
        difference = registry.finish(state).pixels.astype(int) - registry.finish(alone).pixels
        most = max(most, int(abs(difference).max()))
    return most


def measure(model: str) -> None:
    """Print the row of one model."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        registry = load(MODELS_DIR, "cpu", 1, LoadOptions(models={model: MODELS[model]}, lora_dir=folder))
        files(registry.residents[model].family.pipeline, folder)
        adapted = [request(model, seed, loras) for seed, loras in enumerate(SETS)]
        plain = [replace(one, loras=()) for one in adapted]
        alike = [replace(one, loras=SETS[0]) for one in adapted]
        ways: list[Callable[[], float]] = [
            lambda: together(registry, adapted),
            lambda: one_by_one(registry, adapted),
            lambda: together(registry, plain),
            lambda: together(registry, alike),
        ]
        rounds = [[way() for way in ways] for _ in range(ROUNDS + 1)][1:]  # in turns, so that a busy moment hits all
        mixed, alone, without, same = (statistics.median(times) for times in zip(*rounds, strict=True))
        numbers = f"{largest_difference(registry, adapted)} | {alone / mixed:.2f} | {without / mixed:.2f}"
        line = f"| {model} | {len(set(SETS))} | {STEPS} | {numbers} | {without / same:.2f} |"
        print(line)  # noqa: T201  # its output


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    head = "| model | sets | passes | largest difference to alone (of 255) | to one by one | to no LoRA | one for all |"
    print(f"{head}\n| --- | --- | --- | --- | --- | --- | --- |")  # noqa: T201  # its output
    for model in sys.argv[1:] or ["sdxl", "flux"]:
        measure(model)


if __name__ == "__main__":
    main()
