"""The oracle: drawing step by step equals the stock diffusers pipelines, alone and in a batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stable_diffusion_server.orders import Job, Task
from stable_diffusion_server.pipelines.catalog import MODELS, SCHEDULERS

PROMPT = "a red circle on a blue background"


def job(model: str, **changes: Any) -> Job:
    facts = MODELS[model]
    side = facts.floor
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
    return Job(**{**values, **changes})


def draw(registry: Any, *jobs: Job) -> list[NDArray[np.uint8]]:
    """Draw jobs of one shape together; those with fewer steps leave earlier."""
    states = [registry.prepare(each) for each in jobs]
    while running := [state for state in states if not state.done]:
        registry.step(running)
    return [registry.finish(state).pixels for state in states]


def stock(registry: Any, asked: Job) -> NDArray[np.uint8]:
    """The same job by the stock pipeline's own `__call__`."""
    pipeline = registry._families[asked.model].pipeline
    original = pipeline.scheduler
    facts = SCHEDULERS[asked.scheduler]
    import diffusers

    pipeline.scheduler = getattr(diffusers, facts.class_name).from_config(original.config, **facts.options)
    more: dict[str, Any] = {"negative_prompt": asked.negative_prompt} if asked.model == "sdxl" else {}
    if asked.model == "flux":
        more["max_sequence_length"] = MODELS["flux"].text_tokens
    try:
        return np.asarray(
            pipeline(
                prompt=asked.prompt,
                width=asked.width,
                height=asked.height,
                num_inference_steps=asked.num_inference_steps,
                guidance_scale=asked.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(asked.seed),
                **more,
            ).images[0]
        )
    finally:
        pipeline.scheduler = original


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other).max())


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio in dB; infinite for equal pictures."""
    error = float(((one.astype(float) - other) ** 2).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


JOBS = {
    "sdxl as by default": job("sdxl"),
    "sdxl without guidance": job("sdxl", guidance_scale=1.0),
    "sdxl with a negative prompt": job("sdxl", guidance_scale=4.0, negative_prompt="blue", num_inference_steps=6),
    "sdxl oblong": job("sdxl", width=2 * MODELS["sdxl"].floor),
    "sdxl, a scheduler that draws noise": job("sdxl", scheduler="euler_a", num_inference_steps=5),
    "sdxl, ddim": job("sdxl", scheduler="ddim", num_inference_steps=3),
    "flux as by default": job("flux"),
    "flux, one step": job("flux", num_inference_steps=1, seed=9),
    "flux oblong": job("flux", height=2 * MODELS["flux"].floor, num_inference_steps=3),
}


@pytest.mark.parametrize("name", JOBS)
def test_our_steps_draw_what_the_stock_pipeline_draws(registry: Any, name: str) -> None:
    """Same components, seed and scheduler, fp32: no pixel differs by more than 2 of 255."""
    asked = JOBS[name]
    (ours,) = draw(registry, asked)
    assert difference(ours, stock(registry, asked)) <= 2


@pytest.mark.parametrize(
    "mixed",
    [
        [job("sdxl", seed=n, num_inference_steps=2 + n, guidance_scale=1.0 + n % 3) for n in range(5)]
        + [job("sdxl", seed=8, scheduler="euler_a"), job("sdxl", prompt="a green star on a white background")],
        [job("flux", seed=n, num_inference_steps=1 + n) for n in range(4)] + [job("flux", prompt="a pink heart")],
    ],
    ids=["sdxl", "flux"],
)
def test_a_picture_is_the_same_alone_and_in_a_mixed_batch(registry: Any, mixed: list[Job]) -> None:
    """Different steps, guidance, schedulers, seeds and prompts in one batch: at least 45 dB to each drawn alone."""
    for together, asked in zip(draw(registry, *mixed), mixed, strict=True):
        (alone,) = draw(registry, asked)
        assert psnr(together, alone) >= 45


def test_a_job_that_joins_half_way_changes_nothing_for_the_others(registry: Any) -> None:
    """Joining at a step boundary is invisible in every picture."""
    early, late = job("sdxl", seed=1, num_inference_steps=6), job("sdxl", seed=2)
    first = registry.prepare(early)
    for _ in range(3):
        registry.step([first])
    second = registry.prepare(late)
    while running := [state for state in (first, second) if not state.done]:
        registry.step(running)
    for state, asked in ((first, early), (second, late)):
        assert psnr(registry.finish(state).pixels, draw(registry, asked)[0]) >= 45


@pytest.mark.parametrize("model", MODELS)
def test_drawing_twice_gives_equal_bytes(registry: Any, model: str) -> None:
    """A job is a pure value: the same one draws the same pixels, whatever was drawn between."""
    first = draw(registry, job(model))[0]
    draw(registry, job(model, seed=77, prompt="a yellow square on a black background"))
    assert np.array_equal(first, draw(registry, job(model))[0])


@pytest.mark.parametrize(("model", "scheduler"), [(m, s) for m, facts in MODELS.items() for s in facts.schedulers])
def test_every_scheduler_of_the_catalogue_draws(registry: Any, model: str, scheduler: str) -> None:
    """A name in the catalogue is a promise: the picture shows the prompt's colours, at the model's default steps."""
    pixels = draw(registry, job(model, scheduler=scheduler, num_inference_steps=8))[0].astype(int)
    middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
    corner = pixels[4, 4]
    assert middle[0] > middle[2] + 60, "the circle is red"
    assert corner[2] > corner[0] + 60, "the background is blue"


@pytest.mark.parametrize("model", MODELS)
def test_prompts_in_capitals_draw_the_same_colours(registry: Any, model: str) -> None:
    """Nobody should have to know how a tokenizer was trained."""
    plain, shouted = draw(registry, job(model), job(model, prompt=PROMPT.upper()))
    assert np.abs(plain.mean((0, 1)) - shouted.mean((0, 1))).max() < 25


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_counted_as_the_encoder_reads_them(registry: Any, model: str) -> None:
    """Special tokens count, longer texts count more, and texts beyond the limit are counted and not cut."""
    counts = [registry.count_tokens(model, "red " * n) for n in (1, 2, 10, 500)]
    assert all(more > less for less, more in itertools.pairwise(counts))
    assert counts[-1] >= 500
