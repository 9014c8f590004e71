"""Measures the trained models on held-out prompts with fixed seeds, by the image checker."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline
from PIL import Image

from training.captions import restyled, say_scene
from training.image_checker import check_landscape, check_scene
from training.latent_cache import held_out
from training.synthetic_landscapes import Landscape
from training.synthetic_shapes import Picture, Scene, sheet
from training.text import T5_LENGTH
from training.vae import render

GUIDANCE = {"sdxl": 2.0, "flux": 0.0}
"""Recommended guidance scale by family."""


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    size: tuple[int, int] = (256, 256),
    steps: int = 4,
    guidance: float | None = None,
    at_once: int = 10,
    **extra: Any,
) -> list[Picture]:
    """Generate an image for every prompt, seeded by its index. ``size`` is width and height in pixels."""
    family = "flux" if isinstance(pipe, FluxPipeline) else "sdxl"
    extra = ({"max_sequence_length": T5_LENGTH} if family == "flux" else {}) | extra
    pictures: list[Picture] = []
    for start in range(0, len(prompts), at_once):
        part = list(prompts[start : start + at_once])
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        with torch.no_grad():
            out = pipe(
                prompt=part,
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=GUIDANCE[family] if guidance is None else guidance,
                generator=seeds,
                output_type="np",
                **extra,
            )
        pictures += list((out.images * 255).round().astype(np.uint8))
    return pictures


def check(picture: Picture, scene: Scene | Landscape) -> dict[str, bool]:
    """Check an image of either kind of scene; returns fact → whether it is right."""
    return check_landscape(picture, scene) if isinstance(scene, Landscape) else check_scene(picture, scene)


def rates(pictures: Sequence[Picture], scenes: Sequence[Scene | Landscape]) -> dict[str, float]:
    """Return for each fact the share (0–1) of images in which it is right, among images to which it applies."""
    verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    facts = dict.fromkeys(fact for verdict in verdicts for fact in verdict)
    return {fact: round(float(np.mean([v[fact] for v in verdicts if fact in v])), 3) for fact in facts}


def prompts_for(scenes: Sequence[Scene | Landscape], rate: float = 0.0, typed: bool = False) -> list[str]:
    """Write the scenes' captions with a fixed seed.

    ``rate`` (0–1) is the probability of paraphrases, ``typed`` adds capitals and punctuation.
    """
    rng = np.random.default_rng(90_100)
    said = [say_scene(scene, rng, rate) for scene in scenes]
    return [restyled(caption, rng) for caption in said] if typed else said


def show_samples(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write a sheet of held-out samples and a line of accuracy figures into a stage's folder."""
    sets = {
        "one": held_out("one", "flat", 20, 90_201) + held_out("placed", "flat", 4, 90_202),
        "two": held_out("two", "flat", 20, 90_203),
        "rest": held_out("many", None, 3, 90_204) + held_out("landscape", None, 7, 90_206),
    }
    drawn = {name: draw(pipe, prompts_for(scenes), at_once=12) for name, scenes in sets.items()}
    note = {name: rates(drawn[name], scenes) for name, scenes in sets.items()}
    with (folder / "figures.txt").open("a") as file:
        file.write(json.dumps(note) + "\n")
    page = sheet([*drawn["one"][:20], *drawn["two"], *drawn["rest"]], 10)
    image = Image.fromarray(page)
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(folder / "samples.png")


def truth(scenes: Sequence[Scene | Landscape], size: tuple[int, int] = (256, 256)) -> dict[str, float]:
    """Return the image checker's result on the rendered scenes themselves, which is its own accuracy."""
    rng = np.random.default_rng(90_300)
    return rates([render(scene, *size, rng) for scene in scenes], scenes)


SETS: dict[str, tuple[str | None, str | None, int, int]] = {
    "one object": ("one", "flat", 100, 91_301),
    "one object, placed": ("placed", "flat", 40, 91_302),
    "two objects": ("two", "flat", 100, 91_303),
    "two or three alike": ("many", "flat", 30, 91_304),
    "landscape": ("landscape", None, 30, 91_305),
}
"""Held-out prompts by name: kind, style, how many, seed. None of the seeds is used in training or tuning."""


def measure(
    pipe: DiffusionPipeline, size: tuple[int, int] = (256, 256), steps: int = 4, **extra: Any
) -> dict[str, dict[str, float]]:
    """Return the rates of every set of ``SETS``, for plain captions.

    For one and two objects, also with paraphrased captions and with typed ones (capitals and punctuation).
    """
    table = {}
    for name, (kind, style, count, seed) in SETS.items():
        scenes = held_out(kind, style, count, seed)
        table[name] = rates(draw(pipe, prompts_for(scenes), size, steps, **extra), scenes)
    for name in ("one object", "two objects"):
        kind, style, count, seed = SETS[name]
        scenes = held_out(kind, style, count // 2, seed + 50)
        spoken = prompts_for(scenes, rate=0.5)
        table[f"{name}, other words"] = rates(draw(pipe, spoken, size, steps, **extra), scenes)
        typed = prompts_for(scenes, typed=True)
        table[f"{name}, capitals and marks"] = rates(draw(pipe, typed, size, steps, **extra), scenes)
    return table


def as_markdown(table: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of rates: a row per set and a column per fact."""
    facts = [*dict.fromkeys(fact for row in table.values() for fact in row if fact != "all"), "all"]
    lines = ["| prompts | " + " | ".join(facts) + " |", "|---" * (len(facts) + 1) + "|"]
    for name, row in table.items():
        cells = [f"{row[fact]:.2f}" if fact in row else "" for fact in facts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def latency(pipe: DiffusionPipeline, size: tuple[int, int] = (256, 256), tries: int = 7) -> float:
    """Return the median seconds of one unbatched image in 4 steps, after one warm-up image."""
    prompt = ["a red circle on a blue background"]
    draw(pipe, prompt, size)
    spent = []
    for _ in range(tries):
        begun = time.perf_counter()
        draw(pipe, prompt, size)
        spent.append(time.perf_counter() - begun)
    return float(np.median(spent))


def contact_sheet(pipe: DiffusionPipeline, path: Path) -> None:
    """Write 40 images of held-out plain prompts at half size: ten each of one, placed, two and landscapes."""
    chosen = [held_out(kind, style, 10, seed + 7) for kind, style, _, seed in SETS.values() if kind != "many"]
    pictures = [picture for scenes in chosen for picture in draw(pipe, prompts_for(scenes))]
    image = Image.fromarray(sheet(pictures, 10))
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Print the tables of one family and write its contact sheet."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("family", choices=["sdxl", "flux"])
    parser.add_argument("--folder", type=Path, help="the pipeline's folder; models/embedded-FAMILY unless given")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--size", default="256x256", help="width x height in pixels")
    parser.add_argument("--sheet", type=Path, help="where to write the contact sheet (PNG)")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    kind = StableDiffusionXLPipeline if asked.family == "sdxl" else FluxPipeline
    folder = asked.folder or Path("models") / f"embedded-{asked.family}"
    pipe = kind.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    width, height = (int(part) for part in asked.size.split("x"))
    table = measure(pipe, (width, height), asked.steps, guidance=asked.guidance)
    sys.stdout.write(f"{asked.family}, {asked.size}, {asked.steps} steps\n\n{as_markdown(table)}\n\n")
    sys.stdout.write(f"{latency(pipe, (width, height)):.2f} s a picture, alone, {asked.threads} thread(s)\n")
    if asked.sheet:
        contact_sheet(pipe, asked.sheet)


if __name__ == "__main__":
    main()
