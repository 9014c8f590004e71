"""Idempotency keys of requests that wait for their answers: taken, answered, given back."""

from __future__ import annotations

import time

import structlog

from stable_diffusion_server.errors import JournalUnavailable
from stable_diffusion_server.jobs.ids import repeated
from stable_diffusion_server.jobs.store.async_store import Clerk
from stable_diffusion_server.jobs.store.records import Claim, Problem, Repeat
from stable_diffusion_server.jobs.store.sqlite_store import Journal
from stable_diffusion_server.types import Receipt

_log = structlog.get_logger(__name__)


class Claims:
    """The part of jobs that keeps what keys were answered with."""

    _clerk: Clerk

    async def claim(self, claim: Claim) -> Repeat | None:
        """Take an idempotency key for a request that waits, or give what it was answered with before.

        Raises `InFlight` while that is not known, and `KeyReused` when the key came with another request.
        """
        before = await self._clerk(Journal.claim, claim, time.time())
        return None if before is None else repeated(claim, before)

    async def answer(self, claim: Claim, outcome: Receipt | Problem | None) -> None:
        """Keep what the request of a key was answered with; `None` lets the next one with the key try anew."""
        try:
            if outcome is None:
                await self._clerk(Journal.release, claim)
            else:
                await self._clerk(Journal.answer, claim, outcome)
        except JournalUnavailable:
            _log.warning("an answer could not be kept for its idempotency key")

    async def renew(self, claim: Claim, before: Repeat) -> None:
        """Let a key whose picture is gone be claimed anew, unless another request has done so meanwhile."""
        await self._clerk(Journal.renew, claim, before.job_id)
