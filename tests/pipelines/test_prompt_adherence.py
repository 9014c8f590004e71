"""Images show the prompt's colours with every scheduler, reproducibly, in capitals too; token counts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.types import DiffusionRequest, Task

PROMPT = "a red circle on a blue background"


def job(model: str, **changes: Any) -> DiffusionRequest:
    facts = MODELS[model]
    side = facts.min_side
    values: dict[str, Any] = {
        "task": Task.TEXT_TO_IMAGE,
        "model": model,
        "revision": facts.revision,
        "prompt": PROMPT,
        "negative_prompt": None,
        "width": side,
        "height": side,
        "seed": 3,
        "num_inference_steps": facts.default_steps,
        "guidance_scale": facts.default_guidance,
        "scheduler": facts.default_scheduler,
    }
    return DiffusionRequest(**{**values, **changes})


def draw(registry: Any, *jobs: DiffusionRequest) -> list[NDArray[np.uint8]]:
    """Generate jobs of one shape together; those with fewer steps leave earlier."""
    states = [registry.prepare(each) for each in jobs]
    while running := [state for state in states if not state.done]:
        registry.step(running)
    return [registry.finish(state).pixels for state in states]


@pytest.mark.parametrize("model", MODELS)
def test_drawing_twice_gives_equal_bytes(registry: Any, model: str) -> None:
    """A job is a pure value: it gives the same pixels, whatever was generated between."""
    first = draw(registry, job(model))[0]
    draw(registry, job(model, seed=77, prompt="a yellow square on a black background"))
    assert np.array_equal(first, draw(registry, job(model))[0])


@pytest.mark.parametrize(("model", "scheduler"), [(m, s) for m, facts in MODELS.items() for s in facts.schedulers])
def test_every_scheduler_of_the_catalogue_draws(registry: Any, model: str, scheduler: str) -> None:
    """The image shows the prompt's colours, at the model's default steps."""
    pixels = draw(registry, job(model, scheduler=scheduler, num_inference_steps=8))[0].astype(int)
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    corner = pixels[4, 4]
    assert middle[0] > middle[2] + 60, "the circle is red"
    assert corner[2] > corner[0] + 60, "the background is blue"


@pytest.mark.parametrize("model", MODELS)
def test_prompts_in_capitals_draw_the_same_colours(registry: Any, model: str) -> None:
    """Users need not know that the tokenizer was trained on lower case."""
    plain, shouted = draw(registry, job(model), job(model, prompt=PROMPT.upper()))
    assert np.abs(plain.mean((0, 1)) - shouted.mean((0, 1))).max() < 25


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_counted_as_the_encoder_reads_them(registry: Any, model: str) -> None:
    """Special tokens count, longer texts count more, and texts beyond the limit are counted and not cut."""
    counts = [registry.count_tokens(model, "red " * n) for n in (1, 2, 10, 500)]
    assert all(more > less for less, more in itertools.pairwise(counts))
    assert counts[-1] >= 500
