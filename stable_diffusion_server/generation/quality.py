"""Checks a generated image, and retries if it is black, not finite or bumpy (visible artifacts)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from stable_diffusion_server.engine import EngineResult
from stable_diffusion_server.errors import InvalidInput, NotFinite, ServerError
from stable_diffusion_server.imaging import Pixels, is_black, score_artifacts
from stable_diffusion_server.pipelines import SCHEDULERS, ModelSpec, check_strength
from stable_diffusion_server.types import DiffusionRequest, RequestWarning, Task, digest

_log = structlog.get_logger(__name__)

_DETAIL = " detail"
_LESS_STRENGTH = 0.01
_BLACK = float("inf")


class DecodedPixels(Protocol):
    """The decoded image that the engine returns."""

    @property
    def pixels(self) -> Pixels:
        """The image at the size of the canvas."""

    @property
    def redecoded(self) -> bool:
        """Whether the decoder had to run again in full precision."""

    @property
    def tiled(self) -> bool:
        """Whether it was encoded or decoded in tiles, since the device had less memory than at other times."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the caller on what the model did not use as it was asked for."""

    @property
    def latents(self) -> NDArray[np.float32] | None:
        """The latents that the request keeps, channels × h × w; then `pixels` are a small preview."""


P = TypeVar("P", bound=DecodedPixels)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retry policy of bumpy images: the number of retries (0: none), and the maximum number of steps.

    `fit` shortens a prompt to the token limit of the model. It may block, so call it off the event loop.
    """

    redraws: int
    max_steps: int
    spec: ModelSpec
    fit: Callable[[str], str]

    def adjust(self, request: DiffusionRequest) -> DiffusionRequest:
        """Change a request for a retry as the original server did: ask for detail; one more step, or less strength.

        Steps stay within the scheduler's bounds. The strength stays unchanged if less of it would leave no step.
        """
        request = replace(request, prompt=self.fit(request.prompt + _DETAIL))
        if request.task in (Task.TEXT_TO_IMAGE, Task.EDIT):
            most = min(self.max_steps, SCHEDULERS[request.scheduler].max_steps)
            return replace(request, num_inference_steps=min(request.num_inference_steps + 1, most))
        weaker = round(request.strength - _LESS_STRENGTH, 4)
        try:
            check_strength(self.spec, request.num_inference_steps, weaker)
        except InvalidInput:
            return request
        return replace(request, strength=weaker)


@dataclass(frozen=True, slots=True)
class CheckedImage(Generic[P]):
    """The best image, the request that made it, seconds per stage over all attempts, and warnings.

    `batched`: it shared forward passes with other requests.
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
    """Return the best image of a few attempts; a good first image needs no retry.

    A result that is not finite, and one that is black, is retried with a new seed, at most once each. A bumpy image is
    retried as `policy` says. If a retry fails after an earlier attempt made an image, that image is returned. Raises
    the errors of `generate`, but `NotFinite` only the second time; with LoRAs `InvalidInput` instead of `NotFinite`,
    since the LoRAs are the likely cause.
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
    """Return the error for a request whose result is not finite with either seed."""
    if not request.loras:
        return error
    names = ", ".join(f"{name}:{weight:g}" for name, weight in request.loras)
    return InvalidInput(f"With {names} the picture is not finite; a smaller weight may help.", field="lora")


def reseeded(request: DiffusionRequest) -> DiffusionRequest:
    """Return the request with another seed, which is derived from the old one."""
    return replace(request, seed=int(digest({"instead of": request.seed})[:8], 16))


def _badness(request: DiffusionRequest, pixels: Pixels, policy: RetryPolicy) -> float:
    """Infinite for black, above 1 for bumpy. Previews are not scored, nor inpainted images, which inherit artifacts."""
    if request.keeps_latents:
        return 0.0
    if is_black(pixels):
        return _BLACK
    return score_artifacts(pixels).score if policy.redraws and request.task is not Task.INPAINT else 0.0


def _warnings(failures: Mapping[str, int], badness: float) -> tuple[RequestWarning, ...]:
    """Return warnings about the attempts and the final image."""
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
