"""Where jobs are handed in, asked after, followed and cancelled, each by its own caller; and requests that wait."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace

import structlog

from stable_diffusion_server.errors import Forbidden, JobStoreUnavailable, NotFound, NotReady
from stable_diffusion_server.generation import GenerationService
from stable_diffusion_server.jobs.admission import JobAdmission
from stable_diffusion_server.jobs.crash_attribution import attribute_crash
from stable_diffusion_server.jobs.events import FINAL_EVENT_ID, JobEvent, JobEventLog, JobStatus, final_event_only
from stable_diffusion_server.jobs.idempotency import IdempotencyClaims
from stable_diffusion_server.jobs.ids import (
    check_recorded_response,
    duplicate_job_id_error,
    scope_job_id,
    visible_status,
)
from stable_diffusion_server.jobs.policy import JobPolicy
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
from stable_diffusion_server.jobs.worker import MAX_CRASHES, MAX_KILLS, JobWorker
from stable_diffusion_server.observability import DeviceRecord
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult

_log = structlog.get_logger(__name__)

_HOUR = 3600.0
_RECENT, _LISTED = 64, 100
_HOUSEKEEPING, _BEAT = 60.0, 10.0


class JobManager(IdempotencyClaims):
    """All jobs of this server. `describe` writes the message that tells a webhook of an end; `transport` sends it.

    `device_record` knows what was on the device when the process before this one ended, and how that was.
    `refresh_caller` gives the caller of a job that was accepted before a restart as the keys of today have it.
    """

    def __init__(
        self,
        service: GenerationService,
        store: SqliteJobStore,
        policy: JobPolicy,
        describe: Callable[[JobRecord], str],
        transport: WebhookTransport,
        device_record: DeviceRecord,
        refresh_caller: Callable[[Caller], Caller] = lambda caller: caller,
    ) -> None:
        self._refresh_caller = refresh_caller
        self._service = service
        self._transport = transport
        self._store = AsyncJobStore(store)
        self._policy = policy
        self._device_record = device_record
        self._worker = JobWorker(
            service, self._store, policy.concurrency, describe, self._on_job_ended, policy.max_seconds
        )
        self._admission = JobAdmission(self._worker, policy.max_queued, policy.store_bytes)
        self._webhooks = WebhookDispatcher(self._store, transport, policy.webhook_secret, policy.webhook_backoff)
        self._active: dict[str, JobHandle] = {}
        self._recent: OrderedDict[str, JobHandle] = OrderedDict()
        self._epoch = secrets.token_hex(4)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._clock_offset = time.time() - time.monotonic()
        self.usable = False

    @property
    def waiting(self) -> int:
        """Accepted jobs that wait for their turn at the queue for the device."""
        return self._worker.waiting

    @property
    def running(self) -> int:
        """Accepted jobs that are being drawn, or stored."""
        return self._worker.running

    @property
    def unfinished(self) -> int:
        """Accepted jobs whose end is not written yet."""
        return self._worker.unfinished

    async def start(self) -> None:
        """Open the journal and go on with what it holds; a journal that cannot be opened is tried again later."""
        await self._open_store()
        self._tasks = [
            asyncio.create_task(loop()) for loop in (self._worker.run, self._webhooks.run, self._run_housekeeping)
        ]
        self._worker.progress.watch_over(self._tasks)

    def drain(self) -> None:
        """Take no more jobs, begin none, and send those who follow one home. What is being drawn goes on."""
        self._closing = True
        self._worker.drain()
        for job in self._active.values():
            job.events.close()

    async def stop(self, grace: float) -> None:
        """Give what is being drawn `grace` seconds, and close the journal; it has the rest for the next start."""
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
    ) -> JobStatus | RecordedResponse:
        """Take a job: it is written down with all its files when this returns. Or what its key was answered before.

        Raises `NotReady` when the server goes down, `QueueFull` when too many jobs wait, or too many of this caller's,
        `JobStoreUnavailable`, `RequestInProgress` for an id that is taken, and what the service raises for an order it
        cannot take.
        """
        self._check_open()
        self._admission.check(caller.share)
        if claim is not None and (before := await self._store(SqliteJobStore.recorded_response, claim)) is not None:
            return check_recorded_response(claim, before)
        if request.webhook_url is not None:
            await self._service.validate(request)
            await self._transport.check(request.webhook_url, caller.share)
        settled, fetched = await self._service.prepare_for_storage(request, caller)
        now = time.time()
        record = JobRecord(
            id=self._new_id() if job_id is None else scope_job_id(job_id, caller),
            caller=caller,
            accepted_at=now,
            deadline=None if request.timeout is None else now + request.timeout,
            base_url=base_url,
            webhook_url=request.webhook_url,
            share=caller.share,
            bytes=payload_bytes(payload := JobPayload(settled, fetched)),
        )
        # What is written is drawn, although its caller be gone meanwhile.
        return await asyncio.shield(asyncio.create_task(self._accept_durably(record, payload, claim)))

    async def track_request(self, caller: Caller, job_id: str | None = None) -> JobHandle:
        """Let a request that waits for its answer be followed and cancelled by an id. Raises `RequestInProgress`."""
        job = self._register(caller, self._new_id() if job_id is None else scope_job_id(job_id, caller))
        if job_id is None:
            return job
        known = None
        try:
            with suppress(JobStoreUnavailable):  # then no accepted job can be asked after either
                known = await self._store(SqliteJobStore.find, job.record.id)
        except BaseException:
            del self._active[job.record.id]
            raise
        if known is not None:
            del self._active[job.record.id]
            raise duplicate_job_id_error()
        return job

    def finish_request(self, job: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Note how such a request was answered; it can be asked after for a while."""
        job.end(state, time.time(), outcome)
        job.publish_end()
        del self._active[job.record.id]
        self._recent[job.record.id] = job
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    async def status(self, job_id: str, caller: Caller) -> JobStatus:
        """How a job stands. Raises `NotFound` for one that is not the caller's."""
        return visible_status(caller, await self._find(job_id, caller))

    async def list_jobs(self, caller: Caller) -> list[JobStatus]:
        """The latest accepted jobs, newest first: the caller's own, everyone's for who manages.

        Raises `Forbidden` for an anonymous caller, whose jobs are known by their ids alone.
        """
        if caller.anonymous:
            raise Forbidden("Without a key jobs are not listed: each is known by its id alone.")
        records = await self._store(
            SqliteJobStore.list_recent, None if caller.has_full_access else caller.owner, _LISTED
        )
        return [visible_status(caller, self._active.get(record.id) or record) for record in records]

    async def cancel(self, job_id: str, caller: Caller) -> JobStatus:
        """Take a job out of the queue or off the device; one that has ended stays as it is. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if not isinstance(found, JobHandle):
            return JobStatus.from_record(found)
        if not found.finished:
            await self._worker.cancel(found)
        return found.status

    async def follow(self, job_id: str, caller: Caller, after: str | None) -> AsyncGenerator[JobEvent | None] | None:
        """The job's events after one of them, `None` among them when nothing happens for a while. Raises `NotFound`.

        `None` instead when that was the last one.
        """
        if after == FINAL_EVENT_ID:
            return None
        found = await self._find(job_id, caller)
        return (
            found.events.follow(after, _BEAT)
            if isinstance(found, JobHandle)
            else final_event_only(JobStatus.from_record(found))
        )

    async def wait_for(self, job_id: str, caller: Caller, seconds: float) -> JobStatus:
        """How an accepted job stands when it has ended, or when so many seconds are over. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if isinstance(found, JobHandle):
            with suppress(TimeoutError):  # it goes on without its caller
                async with asyncio.timeout(seconds):
                    await found.ended.wait()
        return visible_status(caller, found)

    def health(self) -> str | None:
        """Why accepted jobs make no progress, in one sentence; `None` while they do."""
        return self._worker.progress.health()

    def store_bytes(self) -> int:
        """Size of the job store on disk, in bytes."""
        return self._store.bytes_on_disk()

    def _new_id(self) -> str:
        """An id no one can guess, of 128 random bits: of an anonymous caller's job it is all that is asked for."""
        return self._policy.id_prefix + secrets.token_urlsafe(16)

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
                before = await self._store(SqliteJobStore.accept, record, payload, claim)
            except BaseException:
                del self._active[record.id]
                raise
            if before is not None and claim is not None:
                del self._active[record.id]
                return check_recorded_response(claim, before)
            # An earlier request of this id that only waited would hide it.
            self._recent.pop(record.id, None)
            self._worker.enqueue(job)
            return job.status

    def _register(self, caller: Caller, job_id: str) -> JobHandle:
        job = JobHandle(JobRecord(job_id, caller, time.time()), JobEventLog(self._epoch))
        if job.record.id in self._active:
            raise duplicate_job_id_error()
        self._active[job.record.id] = job
        return job

    async def _find(self, job_id: str, caller: Caller) -> JobHandle | JobRecord:
        """The job of that id, if the caller may follow it: others are not told that it exists."""
        for whole in dict.fromkeys((scope_job_id(job_id, caller), job_id)):
            found: JobHandle | JobRecord | None = self._active.get(whole) or self._recent.get(whole)
            if found is None:
                found = await self._store(SqliteJobStore.find, whole)
            owner = found.record.caller if isinstance(found, JobHandle) else found.caller if found is not None else None
            if found is not None and owner is not None and caller.may_access_jobs_of(owner):
                return found
        raise NotFound("There is no such job.")

    def _on_job_ended(self, job: JobHandle) -> None:
        self._active.pop(job.record.id, None)
        if job.record.webhook_url is not None:
            self._webhooks.wake()

    async def _open_store(self) -> None:
        try:
            await self._store(SqliteJobStore.open)
            records = await self._store(SqliteJobStore.unfinished)
        except JobStoreUnavailable:
            self.usable = False
            return
        death = await asyncio.to_thread(self._device_record.begin)
        records = attribute_crash(found := records, death)
        with suppress(JobStoreUnavailable):  # told by the journal; what is not written counts in this process alone
            for record in set(records) - set(found):
                await self._store(SqliteJobStore.save_crash_counts, record)
        self.usable = True
        if records:
            _log.info("jobs are taken up again", jobs=len(records))
        for record in records:
            caller = self._refresh_caller(record.caller)
            job = JobHandle(replace(record, state=JobState.QUEUED, caller=caller), JobEventLog(self._epoch))
            self._active[record.id] = job
            if record.crashes >= MAX_CRASHES or record.kills >= MAX_KILLS:
                await self._worker.fail_poisoned(job)
            else:
                self._worker.enqueue(job)

    async def _run_housekeeping(self) -> None:
        """Open a journal that could not be opened, and forget what is past, for ever."""
        while True:
            if not self.usable:
                await asyncio.sleep(self._policy.reopen_seconds)
                await self._open_store()
                continue
            # Not forgotten early because the clock was set forward meanwhile: by both clocks its time must be over.
            now, policy = min(time.time(), self._clock_offset + time.monotonic()), self._policy
            with suppress(JobStoreUnavailable):  # told by the journal, and tried again
                await self._store(
                    SqliteJobStore.expire, now - policy.retention_hours * _HOUR, now - policy.idempotency_hours * _HOUR
                )
            await asyncio.sleep(_HOUSEKEEPING)
