"""Idempotency keys of synchronous requests: claim, record the response, release."""

from __future__ import annotations

import time

import structlog

from stable_diffusion_server.errors import IdempotencyKeyReused, JobStoreUnavailable, RequestInProgress
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import IdempotencyClaim, RecordedResponse, StoredProblem
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)


class IdempotencyClaims:
    """Base class of the job manager: records responses by idempotency key."""

    def __init__(self, store: AsyncJobStore) -> None:
        self._store = store

    async def claim(self, claim: IdempotencyClaim) -> RecordedResponse | None:
        """Claim a key for a synchronous request, or return its recorded response.

        Raises `RequestInProgress` while the first request runs, and `IdempotencyKeyReused` if a different request
        used the key.
        """
        before = await self._store.claim(claim, time.time())
        return None if before is None else check_recorded_response(claim, before)

    async def answer(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem | None) -> None:
        """Record the response of a key; `None` releases the key, so that the client can retry the request."""
        try:
            if outcome is None:
                await self._store.release_claim(claim)
            else:
                await self._store.record_response(claim, outcome)
        except JobStoreUnavailable:
            _log.warning("the response to an idempotency key could not be stored")

    async def renew(self, claim: IdempotencyClaim, before: RecordedResponse) -> None:
        """Release a key because its image was deleted, unless another request has claimed the key meanwhile."""
        await self._store.discard_response(claim, before.job_id)


def check_recorded_response(claim: IdempotencyClaim, before: RecordedResponse) -> RecordedResponse:
    """Return the recorded response if it belongs to this request.

    Raises `IdempotencyKeyReused` for a different request, and `RequestInProgress` while no response exists yet.
    """
    if before.fingerprint != claim.fingerprint:
        raise IdempotencyKeyReused("This key came with another request before.", field="Idempotency-Key")
    if before.job_id is None and before.outcome is None:
        raise RequestInProgress("The request with this key is being answered.", field="Idempotency-Key", retry_after=1)
    return before
