"""Runs the calls of a `SqliteJobStore` on one thread, in order, for use from the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from stable_diffusion_server.jobs.store.records import (
    IdempotencyClaim,
    JobPayload,
    JobRecord,
    OutboxMessage,
    RecordedResponse,
    StoredProblem,
)
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.types import GenerationResult

P = ParamSpec("P")
T = TypeVar("T")


class AsyncJobStore:
    """Offers the methods of `SqliteJobStore` as coroutines. A started call completes even if its task is cancelled."""

    def __init__(self, store: SqliteJobStore) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="job-store")

    async def open(self) -> None:
        """See `SqliteJobStore.open`."""
        await self._run(self._store.open)

    async def close(self) -> None:
        """Complete pending calls, then close the store."""
        await self._run(self._store.close)
        self._executor.shutdown(wait=False)

    def bytes_on_disk(self) -> int:
        """Return the size of the store on disk in bytes. Any thread may call it; it does not use the store's thread."""
        return self._store.bytes_on_disk()

    async def accept(
        self,
        record: JobRecord,
        payload: JobPayload,
        claim: IdempotencyClaim | None = None,
        message: str | None = None,
    ) -> RecordedResponse | None:
        """See `SqliteJobStore.accept`."""
        return await self._run(self._store.accept, record, payload, claim, message)

    async def begin_attempt(self, job_id: str) -> JobPayload:
        """See `SqliteJobStore.begin_attempt`."""
        return await self._run(self._store.begin_attempt, job_id)

    async def requeue(self, job_id: str, *, forgiven: bool) -> None:
        """See `SqliteJobStore.requeue`."""
        await self._run(self._store.requeue, job_id, forgiven=forgiven)

    async def save_crash_counts(self, record: JobRecord) -> None:
        """See `SqliteJobStore.save_crash_counts`."""
        await self._run(self._store.save_crash_counts, record)

    async def finish(self, record: JobRecord, message: str | None = None) -> None:
        """See `SqliteJobStore.finish`."""
        await self._run(self._store.finish, record, message)

    async def find(self, job_id: str) -> JobRecord | None:
        """See `SqliteJobStore.find`."""
        return await self._run(self._store.find, job_id)

    async def unfinished(self) -> list[JobRecord]:
        """See `SqliteJobStore.unfinished`."""
        return await self._run(self._store.unfinished)

    async def list_recent(self, owner: str | None, limit: int) -> list[JobRecord]:
        """See `SqliteJobStore.list_recent`."""
        return await self._run(self._store.list_recent, owner, limit)

    async def recorded_response(self, claim: IdempotencyClaim) -> RecordedResponse | None:
        """See `SqliteJobStore.recorded_response`."""
        return await self._run(self._store.recorded_response, claim)

    async def claim(self, claim: IdempotencyClaim, now: float) -> RecordedResponse | None:
        """See `SqliteJobStore.claim`."""
        return await self._run(self._store.claim, claim, now)

    async def record_response(self, claim: IdempotencyClaim, outcome: GenerationResult | StoredProblem) -> None:
        """See `SqliteJobStore.record_response`."""
        await self._run(self._store.record_response, claim, outcome)

    async def release_claim(self, claim: IdempotencyClaim) -> None:
        """See `SqliteJobStore.release_claim`."""
        await self._run(self._store.release_claim, claim)

    async def discard_response(self, claim: IdempotencyClaim, job_id: str | None) -> None:
        """See `SqliteJobStore.discard_response`."""
        await self._run(self._store.discard_response, claim, job_id)

    async def expire(self, jobs_before: float, claims_before: float) -> None:
        """See `SqliteJobStore.expire`."""
        await self._run(self._store.expire, jobs_before, claims_before)

    async def due_messages(self, now: float, waits: Sequence[float]) -> list[OutboxMessage]:
        """See `OutboxStore.due_messages`."""
        return await self._run(self._store.due_messages, now, waits)

    async def postpone(self, message: OutboxMessage, due: float) -> None:
        """See `OutboxStore.postpone`."""
        await self._run(self._store.postpone, message, due)

    async def delete_message(self, message: OutboxMessage) -> None:
        """See `OutboxStore.delete_message`."""
        await self._run(self._store.delete_message, message)

    async def _run(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(call, *args, **kwargs))
