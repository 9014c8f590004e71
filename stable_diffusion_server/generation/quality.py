"""Checks a generated image, and generates it again if it is black, not finite or bumpy."""

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
    """The engine's product."""

    @property
    def pixels(self) -> Pixels:
        """The picture at the canvas's size."""

    @property
    def redecoded(self) -> bool:
        """Whether the decoder had to run again in full precision."""


P = TypeVar("P", bound=DecodedPixels)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a bumpy image is generated again: how often (0: never), and up to how many steps.

    `fit` shortens a prompt to what the model reads; it may block, and is called off the event loop.
    """

    redraws: int
    max_steps: int
    spec: ModelSpec
    fit: Callable[[str], str]

    def adjust(self, request: DiffusionRequest) -> DiffusionRequest:
        """The job as the original server tried it again: asking for detail; with a step more, or closer to the image.

        Steps stay within the scheduler's bounds, and the strength where less of it would leave no step to take.
        """
        request = replace(request, prompt=self.fit(request.prompt + _DETAIL))
        if request.task is Task.TEXT_TO_IMAGE:
            most = min(self.max_steps, SCHEDULERS[request.scheduler].max_steps)
            return replace(request, num_inference_steps=min(request.num_inference_steps + 1, most))
        weaker = round(request.strength - _LESS_STRENGTH, 4)
        try:
            steps_skipped(self.spec, request.num_inference_steps, weaker)
        except InvalidInput:
            return request
        return replace(request, strength=weaker)


@dataclass(frozen=True, slots=True)
class CheckedImage(Generic[P]):
    """The best image, the request that made it, seconds per stage over all attempts, and warnings.

    `batched`: it shared forward passes with others.
    """

    request: DiffusionRequest
    product: P
    timings: Mapping[str, float]
    warnings: tuple[RequestWarning, ...]
    batched: bool = False


@dataclass(frozen=True, slots=True)
class _Attempt(Generic[P]):
    """An image and its badness: above 1 if bumpy, infinite if black."""

    job: DiffusionRequest
    product: P
    badness: float
    batched: bool


async def generate_with_retries(
    request: DiffusionRequest, generate: Callable[[DiffusionRequest], Awaitable[EngineResult[P]]], policy: RetryPolicy
) -> CheckedImage[P]:
    """The best of a few attempts; a single one if it is good.

    Not finite or black: once more with a new seed, each at most once. Too bumpy: as `remedy` says. A try that fails
    costs nothing once there is a picture. Raises what `draw` raises, `NotFinite` the second time: with adapters
    `InvalidInput`, since it is their doing as far as can be known.
    """
    best: _Attempt[P] | None = None
    timings: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    while True:
        try:
            result = await generate(request)
        except ServerError as error:
            if best is not None:
                _log.warning("a redraw failed; the picture at hand is kept", kind=error.kind)
                break
            if not isinstance(error, NotFinite):
                raise
            if failures["not-finite"]:
                raise _not_finite_error(request, error) from error
            failures["not-finite"] += 1
            request = reseeded(request)
            continue
        timings.update(result.timings)
        badness = await asyncio.to_thread(_badness, request, result.product.pixels, policy)
        if best is None or badness < best.badness:
            best = _Attempt(request, result.product, badness, result.batched)
        if badness == _BLACK and not failures["black"] and not failures["bumpy"]:
            failures["black"] += 1
            request = reseeded(request)
        elif 1 < badness < _BLACK and failures["bumpy"] < policy.redraws:
            failures["bumpy"] += 1
            request = await asyncio.to_thread(policy.adjust, request)
        else:
            break
    return CheckedImage(best.job, best.product, timings, _warnings(failures, best.badness), best.batched)


def _not_finite_error(request: DiffusionRequest, error: NotFinite) -> ServerError:
    """The error of a request that is not finite with any seed."""
    if not request.loras:
        return error
    names = ", ".join(f"{name}:{weight:g}" for name, weight in request.loras)
    return InvalidInput(f"With {names} the picture is not finite; a smaller weight may help.", field="lora")


def reseeded(request: DiffusionRequest) -> DiffusionRequest:
    """The request with another seed, always the same one."""
    return replace(request, seed=int(digest({"instead of": request.seed})[:8], 16))


def _badness(request: DiffusionRequest, pixels: Pixels, policy: RetryPolicy) -> float:
    """Infinite for black, above 1 for bumpy. Inpainted images inherit artifacts of the original, so are not scored."""
    if is_black(pixels):
        return _BLACK
    return score_artifacts(pixels).score if policy.redraws and request.task is not Task.INPAINT else 0.0


def _warnings(failures: Mapping[str, int], badness: float) -> tuple[RequestWarning, ...]:
    """Warnings about the attempts and the final image."""
    warnings = []
    if failures["not-finite"]:
        warnings.append(
            RequestWarning("redrawn-not-finite", "The numbers were not finite; it was drawn with another seed.")
        )
    if failures["black"]:
        warnings.append(
            RequestWarning("redrawn-black", "The picture was black; it was drawn once more with another seed.")
        )
    if failures["bumpy"]:
        tries = "once more" if failures["bumpy"] == 1 else f"{failures['bumpy']} times more"
        warnings.append(
            RequestWarning("redrawn-bumpy", f"The picture was too bumpy; it was drawn {tries}, the best is kept.")
        )
    if badness == _BLACK:
        warnings.append(RequestWarning("black", "The picture is black."))
    elif badness > 1:
        warnings.append(RequestWarning("bumpy", "The picture has much black, much white and uneven greys."))
    return tuple(warnings)
