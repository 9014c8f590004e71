"""Job manager: accepts, lists, follows and cancels jobs, and tracks synchronous requests by id."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace

import structlog
from cachetools import FIFOCache

from stable_diffusion_server.errors import Forbidden, JobStoreUnavailable, NotFound, NotReady
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.jobs.events import FINAL_EVENT_ID, JobEvent, JobEventLog, JobStatus, final_event_only
from stable_diffusion_server.jobs.idempotency import IdempotencyClaims, check_recorded_response
from stable_diffusion_server.jobs.ids import duplicate_job_id_error, new_job_id, scope_job_id, visible_status
from stable_diffusion_server.jobs.job_queue import JobAdmission
from stable_diffusion_server.jobs.policy import MAX_CRASHES, MAX_KILLS, JobPolicy, attribute_crash
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import (
    IdempotencyClaim,
    JobPayload,
    JobRecord,
    JobState,
    RecordedResponse,
    StoredProblem,
)
from stable_diffusion_server.jobs.store.serialization import payload_bytes
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.jobs.webhooks import WebhookDispatcher, WebhookTransport
from stable_diffusion_server.jobs.worker import JobWorker
from stable_diffusion_server.observability import DeviceRecord
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult

_log = structlog.get_logger(__name__)

# Maximum number of ended synchronous requests whose status stays available, and of jobs in a listing.
_RECENT_REQUESTS, _LIST_LIMIT = 64, 100
_HOUSEKEEPING_SECONDS, _KEEPALIVE_SECONDS, _HOUR = 60.0, 10.0, 3600.0


class JobManager(IdempotencyClaims):
    """All jobs of this server. Not thread-safe: use it on one event loop.

    `describe` renders an accepted or finished job as webhook message, `transport` sends it. `device_record` reports
    what ran on the device when the previous process ended. `refresh_caller` updates the caller of a job accepted before
    a restart to the rights of the current API keys.
    """

    def __init__(
        self,
        service: GenerationService,
        store: SqliteJobStore,
        policy: JobPolicy,
        describe: Callable[[JobRecord], str | None],
        transport: WebhookTransport,
        device_record: DeviceRecord,
        refresh_caller: Callable[[Caller], Caller] = lambda caller: caller,
    ) -> None:
        super().__init__(AsyncJobStore(store))
        self._refresh_caller = refresh_caller
        self._service = service
        self._describe = describe
        self._transport = transport
        self._policy = policy
        self._device_record = device_record
        self._worker = JobWorker(
            service, self._store, policy.concurrency, describe, self._on_job_ended, policy.max_seconds
        )
        self._admission = JobAdmission(self._worker.queue, policy.max_queued, policy.store_bytes)
        self._webhooks = WebhookDispatcher(self._store, transport, policy.webhook_secret, policy.webhook_backoff)
        self._active: dict[str, JobHandle] = {}
        self._recent: FIFOCache[str, JobHandle] = FIFOCache(_RECENT_REQUESTS)
        self._epoch = secrets.token_hex(4)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._clock_offset = time.time() - time.monotonic()
        self.usable = False

    @property
    def waiting(self) -> int:
        """Number of accepted jobs that wait for the engine."""
        return self._worker.queue.waiting

    @property
    def running(self) -> int:
        """Number of accepted jobs that the server generates or stores now."""
        return len(self._worker.queue.running)

    @property
    def unfinished(self) -> int:
        """Number of accepted jobs whose end is not stored yet."""
        return self.waiting + self.running

    async def start(self) -> None:
        """Open the store and resume its jobs. If opening fails, retry in the background."""
        await self._open_store()
        self._tasks = [asyncio.create_task(run()) for run in (self._worker.run, self._webhooks.run, self._maintain)]
        self._worker.supervise(self._tasks)

    def drain(self) -> None:
        """Stop accepting and starting jobs, and end all event streams. Running jobs continue."""
        self._closing = True
        self._worker.drain()
        for job in self._active.values():
            job.events.close()

    async def stop(self, grace: float) -> None:
        """Drain, wait up to `grace` seconds for running jobs, close the store; the next start resumes the others."""
        self.drain()
        await self._worker.stop(grace)
        for task in self._tasks:
            task.cancel()
        await self._store.close()
        self._device_record.end()
        self._transport.close()

    async def accept(
        self,
        request: GenerationRequest,
        caller: Caller,
        *,
        base_url: str = "",
        job_id: str | None = None,
        claim: IdempotencyClaim | None = None,
        form: str = "",
    ) -> JobStatus | RecordedResponse:
        """Accept a job, which is durable on return, or return the recorded response of its idempotency key.

        `form` is what the dialect that accepts it reads again with its status.

        Raises `NotReady` during shutdown, `QueueFull` when too many jobs wait in total or for this caller,
        `JobStoreUnavailable`, `RequestInProgress` for a job id in use, and the service's errors for an invalid
        request.
        """
        self._check_open()
        self._admission.check(caller.share)
        if claim is not None and (before := await self._store.recorded_response(claim)) is not None:
            return check_recorded_response(claim, before)
        if request.webhook_url is not None:
            await self._service.validate(request, caller)
            await self._transport.check(request.webhook_url, caller.share)
        prepared, fetched = await self._service.prepare_for_storage(request, caller)
        payload = JobPayload(prepared, fetched)
        full_id = self._full_id(job_id, caller)
        record = JobRecord.of_request(full_id, caller, payload, payload_bytes(payload), base_url, form)
        # Shielded: a stored job must also reach the queue, even if the caller disconnects in between.
        return await asyncio.shield(asyncio.create_task(self._accept_durably(record, payload, claim)))

    async def track_request(self, caller: Caller, job_id: str | None = None) -> JobHandle:
        """Register a synchronous request by id, to follow and cancel it. Raises `RequestInProgress`."""
        job = self._register(caller, self._full_id(job_id, caller))
        if job_id is None:
            return job
        try:
            with suppress(JobStoreUnavailable):  # while the store is down, stored jobs cannot be queried either
                if await self._store.find(job.record.id) is not None:
                    raise duplicate_job_id_error()  # noqa: TRY301  # needs the same clean-up as other errors
        except BaseException:
            del self._active[job.record.id]
            raise
        return job

    def finish_request(self, job: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Set the outcome of a tracked request; its status stays available until newer requests replace it."""
        job.finish(state, time.time(), outcome)
        job.publish_end()
        del self._active[job.record.id]
        self._recent[job.record.id] = job

    async def status(self, job_id: str, caller: Caller) -> JobStatus:
        """Return the status of a job. Raises `NotFound` if the caller may not access it."""
        return visible_status(caller, await self._find(job_id, caller))

    async def list_jobs(self, caller: Caller) -> list[JobStatus]:
        """Return the latest accepted jobs, newest first: the caller's own jobs; all jobs if it has full access.

        Raises `Forbidden` for an anonymous caller: only the unguessable ids protect anonymous jobs.
        """
        if caller.anonymous:
            raise Forbidden("Without a key jobs are not listed: each is known by its id alone.")
        owner = None if caller.has_full_access else caller.owner
        records = await self._store.list_recent(owner, _LIST_LIMIT)
        return [visible_status(caller, self._active.get(record.id) or record) for record in records]

    async def cancel(self, job_id: str, caller: Caller) -> JobStatus:
        """Cancel a waiting or running job; an ended job stays as it is. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if not isinstance(found, JobHandle):
            return JobStatus.from_record(found)
        if not found.finished:
            await self._worker.cancel(found)
        return found.status

    async def follow(self, job_id: str, caller: Caller, after: str | None) -> AsyncGenerator[JobEvent | None] | None:
        """Return the job's events after the one with id `after`; `None` items are keep-alives. Raises `NotFound`.

        Returns `None` if `after` was the final event.
        """
        if after == FINAL_EVENT_ID:
            return None
        found = await self._find(job_id, caller)
        if isinstance(found, JobHandle):
            return found.events.follow(after, _KEEPALIVE_SECONDS)
        return final_event_only(JobStatus.from_record(found))

    async def wait_for(self, job_id: str, caller: Caller, seconds: float) -> JobStatus:
        """Wait until a job has ended, at most `seconds`, and return its status. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if isinstance(found, JobHandle):
            with suppress(TimeoutError):  # the job continues
                async with asyncio.timeout(seconds):
                    await found.ended.wait()
        return visible_status(caller, found)

    def health(self) -> str | None:
        """See `JobWorker.health`."""
        return self._worker.health()

    def store_bytes(self) -> int:
        """Size of the job store on disk, in bytes."""
        return self._store.bytes_on_disk()

    def _full_id(self, job_id: str | None, caller: Caller) -> str:
        return new_job_id(self._policy.id_prefix) if job_id is None else scope_job_id(job_id, caller)

    def _check_open(self) -> None:
        if self._closing:
            raise NotReady("The server is going down.", retry_after=5)

    async def _accept_durably(
        self, record: JobRecord, payload: JobPayload, claim: IdempotencyClaim | None
    ) -> JobStatus | RecordedResponse:
        self._check_open()
        with self._admission.reserve(record):
            job = self._register(record.caller, record.id)
            job.record = record
            try:
                message = self._describe(record) if record.webhook_url is not None and record.form else None
                before = await self._store.accept(record, payload, claim, message)
            except BaseException:
                del self._active[record.id]
                raise
            if before is not None and claim is not None:
                del self._active[record.id]
                return check_recorded_response(claim, before)
            # An ended synchronous request with the same id would hide this job.
            self._recent.pop(record.id, None)
            self._worker.enqueue(job)
            if message is not None:
                self._webhooks.wake()
            return job.status

    def _register(self, caller: Caller, job_id: str) -> JobHandle:
        job = JobHandle(JobRecord(job_id, caller, time.time()), JobEventLog(self._epoch))
        if job.record.id in self._active:
            raise duplicate_job_id_error()
        self._active[job.record.id] = job
        return job

    async def _find(self, job_id: str, caller: Caller) -> JobHandle | JobRecord:
        """Return the job with that id. Raises `NotFound`, also for a job that the caller may not access."""
        for scoped_id in dict.fromkeys((scope_job_id(job_id, caller), job_id)):
            found: JobHandle | JobRecord | None = self._active.get(scoped_id) or self._recent.get(scoped_id)
            if found is None:
                found = await self._store.find(scoped_id)
            record = found.record if isinstance(found, JobHandle) else found
            if found is not None and record is not None and caller.may_access_jobs_of(record.caller):
                return found
        raise NotFound("There is no such job.")

    def _on_job_ended(self, job: JobHandle) -> None:
        self._active.pop(job.record.id, None)
        if job.record.webhook_url is not None:
            self._webhooks.wake()

    async def _open_store(self) -> None:
        try:
            await self._store.open()
            stored = await self._store.unfinished()
        except JobStoreUnavailable:
            self.usable = False
            return
        crash = await asyncio.to_thread(self._device_record.begin)
        records = attribute_crash(stored, crash)
        with suppress(JobStoreUnavailable):  # on failure the counts live only in this process
            for record in set(records) - set(stored):
                await self._store.save_crash_counts(record)
        self.usable = True
        if records:
            _log.info("stored jobs are resumed", jobs=len(records))
        for record in records:
            caller = self._refresh_caller(record.caller)
            job = JobHandle(replace(record, state=JobState.QUEUED, caller=caller), JobEventLog(self._epoch))
            self._active[record.id] = job
            if record.crashes >= MAX_CRASHES or record.kills >= MAX_KILLS:
                await self._worker.fail_poisoned(job)
            else:
                self._worker.enqueue(job)

    async def _maintain(self) -> None:
        """Reopen an unavailable store and delete expired jobs and claims, in a loop until cancelled."""
        while True:
            if not self.usable:
                await asyncio.sleep(self._policy.reopen_seconds)
                await self._open_store()
                continue
            # Use the earlier of wall clock and monotonic clock: a clock set forward must not expire anything early.
            now, policy = min(time.time(), self._clock_offset + time.monotonic()), self._policy
            with suppress(JobStoreUnavailable):  # logged by the store, retried in the next round
                await self._store.expire(now - policy.retention_hours * _HOUR, now - policy.idempotency_hours * _HOUR)
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
