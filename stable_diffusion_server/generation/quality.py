"""Draws a job, looks at the picture, and draws again where that can mend it. Knows no device, names or storage."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import structlog

from stable_diffusion_server.engine import EngineResult
from stable_diffusion_server.errors import InvalidInput, NotFinite, ServerError
from stable_diffusion_server.imaging import Pixels, is_black, score_artifacts
from stable_diffusion_server.pipelines import SCHEDULERS, ModelSpec, steps_skipped
from stable_diffusion_server.types import DiffusionRequest, RequestWarning, Task, digest

_log = structlog.get_logger(__name__)

_DETAIL = " detail"
_LESS_STRENGTH = 0.01
_BLACK = float("inf")


class DecodedPixels(Protocol):
    """What the engine hands back, as far as it has to be known here."""

    @property
    def pixels(self) -> Pixels:
        """The picture at the canvas's size."""

    @property
    def redecoded(self) -> bool:
        """Whether the decoder had to run again in full precision."""


P = TypeVar("P", bound=DecodedPixels)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a bumpy picture of a model is drawn again: how often (0 lets bumps be), up to which steps, in which words.

    `fit` shortens a prompt to what the model reads; it may block, and is called off the event loop.
    """

    redraws: int
    max_steps: int
    spec: ModelSpec
    fit: Callable[[str], str]

    def adjust(self, job: DiffusionRequest) -> DiffusionRequest:
        """The job as the original server tried it again: asking for detail; with a step more, or closer to the image.

        Steps stay within the scheduler's bounds, and the strength where less of it would leave no step to take.
        """
        job = replace(job, prompt=self.fit(job.prompt + _DETAIL))
        if job.task is Task.TEXT_TO_IMAGE:
            most = min(self.max_steps, SCHEDULERS[job.scheduler].max_steps)
            return replace(job, num_inference_steps=min(job.num_inference_steps + 1, most))
        weaker = round(job.strength - _LESS_STRENGTH, 4)
        try:
            steps_skipped(self.spec, job.num_inference_steps, weaker)
        except InvalidInput:
            return job
        return replace(job, strength=weaker)


@dataclass(frozen=True, slots=True)
class CheckedImage(Generic[P]):
    """The picture that was kept, the job it was drawn from, seconds spent on all tries by stage, and what to tell.

    `batched`: it shared forward passes with others.
    """

    request: DiffusionRequest
    product: P
    timings: Mapping[str, float]
    warnings: tuple[RequestWarning, ...]
    batched: bool = False


@dataclass(frozen=True, slots=True)
class _Try(Generic[P]):
    """A picture and how bad it is: above 1 too bumpy, infinite for black."""

    job: DiffusionRequest
    product: P
    badness: float
    batched: bool


async def generate_with_retries(
    job: DiffusionRequest, draw: Callable[[DiffusionRequest], Awaitable[EngineResult[P]]], remedy: RetryPolicy
) -> CheckedImage[P]:
    """The best of a few tries, one if it is good.

    Not finite or black: once more with a new seed, each at most once. Too bumpy: as `remedy` says. A try that fails
    costs nothing once there is a picture. Raises what `draw` raises, `NotFinite` the second time: with adapters
    `InvalidInput`, since it is their doing as far as can be known.
    """
    best: _Try[P] | None = None
    timings: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    while True:
        try:
            drawing = await draw(job)
        except ServerError as error:
            if best is not None:
                _log.warning("a redraw failed; the picture at hand is kept", kind=error.kind)
                break
            if not isinstance(error, NotFinite):
                raise
            if faults["not-finite"]:
                raise _overflow_of(job, error) from error
            faults["not-finite"] += 1
            job = reseeded(job)
            continue
        timings.update(drawing.timings)
        badness = await asyncio.to_thread(_badness, job, drawing.product.pixels, remedy)
        if best is None or badness < best.badness:
            best = _Try(job, drawing.product, badness, drawing.batched)
        if badness == _BLACK and not faults["black"] and not faults["bumpy"]:
            faults["black"] += 1
            job = reseeded(job)
        elif 1 < badness < _BLACK and faults["bumpy"] < remedy.redraws:
            faults["bumpy"] += 1
            job = await asyncio.to_thread(remedy.adjust, job)
        else:
            break
    return CheckedImage(best.job, best.product, timings, _told(faults, best.badness), best.batched)


def _overflow_of(job: DiffusionRequest, error: NotFinite) -> ServerError:
    """What a job that is not finite with any seed is told."""
    if not job.loras:
        return error
    names = ", ".join(f"{name}:{weight:g}" for name, weight in job.loras)
    return InvalidInput(f"With {names} the picture is not finite; a smaller weight may help.", field="lora")


def reseeded(job: DiffusionRequest) -> DiffusionRequest:
    """The job with another seed, always the same other one."""
    return replace(job, seed=int(digest({"instead of": job.seed})[:8], 16))


def _badness(job: DiffusionRequest, pixels: Pixels, remedy: RetryPolicy) -> float:
    """Infinite for black, above 1 for too bumpy. What is repainted in a picture has the bumps of the rest: let be."""
    if is_black(pixels):
        return _BLACK
    return score_artifacts(pixels).score if remedy.redraws and job.task is not Task.INPAINT else 0.0


def _told(faults: Mapping[str, int], badness: float) -> tuple[RequestWarning, ...]:
    """What the caller should know of the tries and of what came of them."""
    warnings = []
    if faults["not-finite"]:
        warnings.append(
            RequestWarning("redrawn-not-finite", "The numbers were not finite; it was drawn with another seed.")
        )
    if faults["black"]:
        warnings.append(
            RequestWarning("redrawn-black", "The picture was black; it was drawn once more with another seed.")
        )
    if faults["bumpy"]:
        tries = "once more" if faults["bumpy"] == 1 else f"{faults['bumpy']} times more"
        warnings.append(
            RequestWarning("redrawn-bumpy", f"The picture was too bumpy; it was drawn {tries}, the best is kept.")
        )
    if badness == _BLACK:
        warnings.append(RequestWarning("black", "The picture is black."))
    elif badness > 1:
        warnings.append(RequestWarning("bumpy", "The picture has much black, much white and uneven greys."))
    return tuple(warnings)
