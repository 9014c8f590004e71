"""Draws prompts with and without weights with the embedded SDXL, and checks colour, shape and background.

    python -m benchmarks.prompt_weights --count 50

Every prompt is drawn three times from the same seed: without weights, with its colour at 1.4 in AUTOMATIC1111's syntax,
and with the same brackets read as words.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import product
from pathlib import Path

import torch

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.families.sdxl import Sdxl
from stable_diffusion_server.pipelines.loading.loader import LoadOptions
from stable_diffusion_server.types import DiffusionRequest, Task
from training.image_checker import background_of, look, nearest_colour
from training.synthetic_shapes import Picture

SIDE, STEPS = 128, 4
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black")
SHAPES = ("circle", "square", "star", "triangle")
BACKGROUNDS = ("white", "blue", "yellow", "green")
CHECKS = ("one thing", "its colour", "its shape", "the background")


def main() -> None:
    """Draw `--count` prompts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    count = parser.parse_args().count
    spec = MODELS["sdxl"]
    models_dir = Path(__file__).parents[1] / "models"
    family = Sdxl.load(spec, models_dir, torch.device("cpu"), LoadOptions()).family
    scenes = [scene for scene in product(SHAPES, BACKGROUNDS, COLOURS) if scene[1] != scene[2]][::2][:count]
    right: Counter[tuple[str, str]] = Counter()
    for seed, (shape, background, colour) in enumerate(scenes):
        plain, weighted = (f"a {words} {shape} on a {background} background" for words in (colour, f"({colour}:1.4)"))
        for kind, prompt, read in (("none", plain, True), ("1.4", weighted, True), ("as words", weighted, False)):
            request = DiffusionRequest(
                task=Task.TEXT_TO_IMAGE,
                model="sdxl",
                revision=spec.revision,
                prompt=prompt,
                negative_prompt=None,
                width=SIDE,
                height=SIDE,
                seed=seed,
                num_inference_steps=STEPS,
                guidance_scale=spec.default_guidance,
                scheduler=spec.default_scheduler,
                weighted=read,
            )
            state = family.prepare(request)
            while not state.done:
                family.step([state])
            checks = checked(family.finish(state).pixels, shape, background, colour)
            right.update((kind, name) for name, holds in zip(CHECKS, checks, strict=True) if holds)
    print(f"{len(scenes)} prompts, {SIDE}², {STEPS} steps, {spec.revision}\n")  # noqa: T201  # its output
    print("| weight of the colour | " + " | ".join(CHECKS) + " |\n" + "| --- " * 5 + "|")  # noqa: T201  # its output
    for kind in ("none", "1.4", "as words"):
        print(f"| {kind} | " + " | ".join(str(right[kind, name]) for name in CHECKS) + " |")  # noqa: T201  # its output


def checked(picture: Picture, shape: str, background: str, colour: str) -> tuple[bool, ...]:
    """Whether a picture shows one thing, of that colour and shape, on that background."""
    _, found = look(picture)
    first = found[0] if found else None
    return (
        len(found) == 1,
        first is not None and first.colour == colour,
        first is not None and first.shape == shape,
        nearest_colour(background_of(picture)) == background,
    )


if __name__ == "__main__":
    main()
