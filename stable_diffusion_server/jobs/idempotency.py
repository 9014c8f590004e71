"""Idempotency keys of requests that wait for their answers: taken, answered, given back."""

from __future__ import annotations

import time

import structlog

from stable_diffusion_server.errors import JobStoreUnavailable
from stable_diffusion_server.jobs.ids import check_recorded_response
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import IdempotencyClaim, RecordedResponse, StoredProblem
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)


class IdempotencyClaims:
    """The part of jobs that keeps what keys were answered with."""

    _store: AsyncJobStore

    async def claim(self, claim: IdempotencyClaim) -> RecordedResponse | None:
        """Take an idempotency key for a request that waits, or give what it was answered with before.

        Raises `RequestInProgress` while that is not known, and `IdempotencyKeyReused` when the key came with another
        request.
        """
        before = await self._store(SqliteJobStore.claim, claim, time.time())
        return None if before is None else check_recorded_response(claim, before)

    async def answer(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem | None) -> None:
        """Keep what the request of a key was answered with; `None` lets the next one with the key try anew."""
        try:
            if outcome is None:
                await self._store(SqliteJobStore.release_claim, claim)
            else:
                await self._store(SqliteJobStore.record_response, claim, outcome)
        except JobStoreUnavailable:
            _log.warning("an answer could not be kept for its idempotency key")

    async def renew(self, claim: IdempotencyClaim, before: RecordedResponse) -> None:
        """Let a key whose picture is gone be claimed anew, unless another request has done so meanwhile."""
        await self._store(SqliteJobStore.discard_response, claim, before.job_id)
