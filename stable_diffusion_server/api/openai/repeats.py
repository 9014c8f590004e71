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
from stable_diffusion_server.types import SEED_MAX, GenerationRequest


class InFlightSeeds:
    """Chooses seeds for requests without one, and gives a client's retry the seeds of the request it repeats.

    Requests with equal seeds share one generation. OpenAI's clients count retries in `x-stainless-retry-count`. For one
    event loop.
    """

    def __init__(self) -> None:
        self._running: dict[str, list[tuple[int, ...]]] = {}

    @asynccontextmanager
    async def hold(
        self, request: Request, generations: Sequence[GenerationRequest]
    ) -> AsyncIterator[list[GenerationRequest]]:
        """Yield the generations with seeds, which a retry gets while the block runs.

        With an idempotency key the seeds stay as they are, because the key identifies the request.
        """
        if generations[0].seed != "random" or request.headers.get("idempotency-key") is not None:
            yield list(generations)
            return
        route = f"{caller_of(request).share} {request.url.path} {len(generations)}"
        name = await run_in_threadpool(fingerprint, route, generations[0])
        running = self._running.setdefault(name, [])
        is_retry = bool(parse_int(request.headers.get("x-stainless-retry-count", "")))
        seeds = running[0] if is_retry and running else tuple(randbelow(SEED_MAX + 1) for _ in generations)
        running.append(seeds)
        try:
            yield [replace(one, seed=seed, variation=0) for one, seed in zip(generations, seeds, strict=True)]
        finally:
            running.remove(seeds)
            if not running:
                self._running.pop(name, None)


async def claims_of(
    dispatcher: RequestDispatcher, request: Request, generations: Sequence[GenerationRequest], *, streams: bool
) -> list[IdempotencyClaim | None]:
    """Return the idempotency claim of each image of a request, `None` without a key.

    The first image claims the key itself, so that another request with the key is recognized; the others claim the key
    with a number, after a space, which no key contains.
    """
    form = f" {len(generations)}{' stream' if streams else ''}"
    first = await dispatcher.claim_of(request, generations[0], preferences_of(request).key, form)
    if first is None:
        return [None] * len(generations)
    numbered = [replace(first, key=f"{first.key} {number}") for number in range(1, len(generations))]
    return [first, *numbered]
