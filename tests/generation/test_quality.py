"""Retries after quality checks: how often, with which changes, and which warnings. A list supplies the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from fakes import bumpy_pixels, disc
from numpy.typing import NDArray

from stable_diffusion_server.engine import EngineResult
from stable_diffusion_server.errors import InvalidInput, NotFinite, QueueFull, ServerError
from stable_diffusion_server.generation.quality import CheckedImage, RetryPolicy, generate_with_retries
from stable_diffusion_server.pipelines.catalog import MODELS, REAL_MODELS
from stable_diffusion_server.types import DiffusionRequest, ImageArray, Task

GOOD, BLACK = disc(), np.zeros((64, 64, 3), np.uint8)
BUMPY, VERY_BUMPY = (bumpy_pixels(128, 128, ends) for ends in (0.012, 0.2))
NAN = NotFinite("not finite")

JOB = DiffusionRequest(Task.TEXT_TO_IMAGE, "sdxl", "embedded-1", "a red disc", None, 128, 128, 7, 4, 2.0, "euler")


@dataclass(frozen=True)
class Product:
    """Pixels in the engine's format."""

    pixels: NDArray[np.uint8]
    redecoded: bool = False
    tiled: bool = False
    warnings: tuple[str, ...] = ()


class Easel:
    """Returns or raises the next of a list of results, and records the requests."""

    def __init__(self, *results: NDArray[np.uint8] | ServerError) -> None:
        self.results = list(results)
        self.jobs: list[DiffusionRequest] = []

    async def draw(self, job: DiffusionRequest) -> EngineResult[Product]:
        self.jobs.append(job)
        result = self.results.pop(0)
        if isinstance(result, ServerError):
            raise result
        return EngineResult(Product(result), {"denoise": 1.0}, batched=False)


def remedy(**changes: Any) -> RetryPolicy:
    values = {"redraws": 2, "max_steps": 100, "spec": MODELS["sdxl"], "fit": lambda text: text, **changes}
    return RetryPolicy(**values)


async def checked(easel: Easel, job: DiffusionRequest = JOB, **changes: Any) -> tuple[CheckedImage[Product], list[str]]:
    result = await generate_with_retries(job, easel.draw, remedy(**changes))
    return result, [warning.code for warning in result.warnings]


async def test_a_good_picture_is_drawn_once_and_nothing_is_reported() -> None:
    """The common case costs one check."""
    easel = Easel(GOOD)
    result, codes = await checked(easel)
    assert (easel.jobs, codes, result.request) == ([JOB], [], JOB)


@pytest.mark.parametrize(
    ("results", "kept", "codes"),
    [
        ([BLACK, GOOD], 1, ["redrawn-black"]),
        ([BLACK, BLACK], 0, ["redrawn-black", "black"]),
        ([NAN, GOOD], 1, ["redrawn-not-finite"]),
        ([NAN, BLACK, GOOD], 2, ["redrawn-not-finite", "redrawn-black"]),
        ([BLACK, NAN], 0, ["redrawn-black", "black"]),
        ([BUMPY, GOOD], 1, ["redrawn-bumpy"]),
        ([VERY_BUMPY, BUMPY, VERY_BUMPY], 1, ["redrawn-bumpy", "bumpy"]),
        ([BUMPY, VERY_BUMPY, GOOD], 2, ["redrawn-bumpy"]),
        ([BUMPY, BLACK], 0, ["redrawn-bumpy", "bumpy"]),
        ([BUMPY, NAN], 0, ["redrawn-bumpy", "bumpy"]),
        ([BUMPY, QueueFull("full")], 0, ["redrawn-bumpy", "bumpy"]),
        ([NAN, BLACK, BUMPY, BUMPY, BUMPY], 2, ["redrawn-not-finite", "redrawn-black", "redrawn-bumpy", "bumpy"]),
    ],
)
async def test_tries_are_few_the_best_is_kept_and_all_is_reported(
    results: Sequence[Any], kept: int, codes: list[str]
) -> None:
    """Exactly these attempts: black and not finite once each, too bumpy twice; the result's warnings say which."""
    easel = Easel(*results)
    result, reported = await checked(easel)
    assert reported == codes
    assert easel.results == []
    assert result.product.pixels is results[kept]
    assert result.request == easel.jobs[kept]
    assert result.timings == {"denoise": sum(not isinstance(drawn, ServerError) for drawn in results)}


async def test_not_finite_twice_is_the_callers_answer() -> None:
    """One retry with a new seed, then the named error."""
    easel = Easel(NAN, NAN)
    with pytest.raises(NotFinite):
        await checked(easel)
    assert len(easel.jobs) == 2


@pytest.mark.fault(161)
async def test_not_finite_twice_with_adapters_is_blamed_on_the_adapters() -> None:
    """One retry with a new seed, then an error of the `loras` parameter with their names and weights."""
    easel = Easel(NAN, NAN)
    with pytest.raises(InvalidInput, match=r"With ink:2, pastel:-0\.5 the picture is not finite") as refused:
        await checked(easel, replace(JOB, loras=(("ink", 2.0), ("pastel", -0.5))))
    assert refused.value.field == "lora"
    assert len(easel.jobs) == 2


@pytest.mark.parametrize("error", [QueueFull("full"), InvalidInput("no adapter", field="lora")])
async def test_a_fault_that_drawing_again_can_not_mend_is_not_tried_again(error: ServerError) -> None:
    """A full queue or a wrong parameter is final."""
    easel = Easel(error)
    with pytest.raises(type(error)):
        await checked(easel)
    assert len(easel.jobs) == 1


async def test_a_redraw_for_black_changes_the_seed_alone_and_always_to_the_same_one() -> None:
    """A retry is as reproducible as the first attempt."""
    jobs = []
    for _ in range(2):
        easel = Easel(BLACK, GOOD)
        await checked(easel)
        jobs.append(easel.jobs[1])
    assert jobs[0] == jobs[1]
    assert jobs[0].seed != JOB.seed
    assert replace(jobs[0], seed=JOB.seed) == JOB


async def test_a_bumpy_picture_is_asked_for_with_detail_and_a_step_more() -> None:
    """As the original did, and never more steps than allowed, nor a prompt beyond the text encoder's limit."""
    easel = Easel(BUMPY, BUMPY, GOOD)
    await checked(easel)
    assert [job.prompt for job in easel.jobs] == ["a red disc", "a red disc detail", "a red disc detail detail"]
    assert [job.num_inference_steps for job in easel.jobs] == [4, 5, 6]
    easel = Easel(BUMPY, GOOD)
    await checked(easel, max_steps=4, fit=lambda text: text[:5])
    assert (easel.jobs[1].prompt, easel.jobs[1].num_inference_steps) == ("a red", 4)


async def test_a_bumpy_style_transfer_stays_a_little_closer_to_its_image() -> None:
    """Strength decreases by 0.01, the steps stay; not where that would leave no step."""
    style = replace(JOB, task=Task.IMAGE_TO_IMAGE, image=ImageArray(GOOD), strength=0.6)
    easel = Easel(BUMPY, BUMPY, GOOD)
    await checked(easel, style)
    assert [job.strength for job in easel.jobs] == [0.6, 0.59, 0.58]
    assert {job.num_inference_steps for job in easel.jobs} == {4}
    easel = Easel(BUMPY, GOOD)
    await checked(easel, replace(style, strength=0.25))
    assert easel.jobs[1].strength == 0.25


async def test_an_inpainting_is_not_scored_by_the_bumps_of_the_rest() -> None:
    """Most of the image is the caller's own; a black result is still detected."""
    inpaint = replace(JOB, task=Task.INPAINT, image=ImageArray(BUMPY), mask=ImageArray(GOOD[..., 0]))
    assert (await checked(Easel(BUMPY), inpaint))[1] == []
    assert (await checked(Easel(BLACK, GOOD), inpaint))[1] == ["redrawn-black"]


async def test_bumps_can_be_let_be() -> None:
    """With zero retries the check does not run and gives no warning; black is still detected."""
    assert (await checked(Easel(BUMPY), redraws=0))[1] == []
    assert (await checked(Easel(BLACK, GOOD), redraws=0))[1] == ["redrawn-black"]


def test_no_model_is_scored_by_bumps_unless_the_operator_asks() -> None:
    """A black disc on white, line art and noir are valid results, for embedded and real models."""
    assert {facts.bumpy_redraws for facts in MODELS.values()} == {0}
    assert {facts.bumpy_redraws for family in REAL_MODELS.values() for facts in family} == {0}
