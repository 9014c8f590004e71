"""Requests that are sent again: retries that join the request they repeat, idempotency claims of several images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import randbelow

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.api.dependencies import caller_of
from stable_diffusion_server.api.dispatch import RequestDispatcher, preferences_of
from stable_diffusion_server.generation import parse_int
from stable_diffusion_server.jobs import IdempotencyClaim, fingerprint
from stable_diffusion_server.types import NOISE_SEEDS, GenerationRequest


class InFlightSeeds:
    """Chooses seeds for requests without one, and gives a client's retry the seed of the request it repeats.

    Requests with equal seeds share one generation. OpenAI's clients count retries in `x-stainless-retry-count`. For one
    event loop.
    """

    def __init__(self) -> None:
        self._running: dict[str, list[int]] = {}

    @asynccontextmanager
    async def hold(
        self, request: Request, generations: Sequence[GenerationRequest]
    ) -> AsyncIterator[list[GenerationRequest]]:
        """Yield the generations with a seed, which a retry gets while the block runs.

        With an idempotency key the seeds stay as they are, because the key identifies the request.
        """
        if generations[0].seed != "random" or request.headers.get("idempotency-key") is not None:
            yield list(generations)
            return
        route = f"{caller_of(request).share} {request.url.path} {len(generations)}"
        name = await run_in_threadpool(fingerprint, route, generations[0])
        running = self._running.setdefault(name, [])
        is_retry = bool(parse_int(request.headers.get("x-stainless-retry-count", "")))
        seed = running[0] if is_retry and running else randbelow(NOISE_SEEDS)
        running.append(seed)
        try:
            yield [replace(one, seed=seed) for one in generations]
        finally:
            running.remove(seed)
            if not running:
                self._running.pop(name, None)


def with_seed(generations: Sequence[GenerationRequest]) -> list[GenerationRequest]:
    """Return the generations of one batch with the same random seed if they have none; image i adds i to it."""
    if generations[0].seed != "random":
        return list(generations)
    seed = randbelow(NOISE_SEEDS)
    return [replace(one, seed=seed) for one in generations]


async def claims_of(
    dispatcher: RequestDispatcher, request: Request, generations: Sequence[GenerationRequest], *, streams: bool
) -> list[IdempotencyClaim | None]:
    """Return the idempotency claim of each image of a request, `None` without a key.

    The first image claims the key itself, so that another request with the key is recognized; the others claim the key
    with a number, after a space, which no key contains. Every image is a part of the fingerprint.
    """
    key, form = preferences_of(request).key, f" {len(generations)}{' stream' if streams else ''}"
    if key is None:
        return [None] * len(generations)
    claims: list[IdempotencyClaim | None] = []
    for number, one in enumerate(generations):
        # The images of a batch rarely differ, and a fingerprint hashes their files.
        same = next((at for at in range(number) if replace(one, variation=at) == generations[at]), None)
        first = await dispatcher.claim_of(request, one, key, form) if same is None else claims[same]
        claims.append(first if first is None or not number else replace(first, key=f"{key} {number}"))
    return claims
