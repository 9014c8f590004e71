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
from stable_diffusion_server.jobs.events import END, JobEvent, JobEventLog, JobStatus, only_end
from stable_diffusion_server.jobs.idempotency import PendingIdempotencyClaims
from stable_diffusion_server.jobs.ids import replayed_job_id, scope_job_id, stored_job_id, visible_job_id
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
from stable_diffusion_server.jobs.store.serialization import size_of
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.jobs.webhooks import WebhookDispatcher, WebhookTransport
from stable_diffusion_server.jobs.worker import MOST_DEATHS, MOST_KILLS, JobWorker
from stable_diffusion_server.observability import DeviceRecord
from stable_diffusion_server.types import Caller, GenerationRequest, GenerationResult

_log = structlog.get_logger(__name__)

_HOUR = 3600.0
_RECENT, _LISTED = 64, 100
_HOUSEKEEPING, _BEAT = 60.0, 10.0


class JobManager(PendingIdempotencyClaims):
    """All jobs of this server. `describe` writes the message that tells a webhook of an end; `poster` sends it.

    `record` knows what was on the device when the process before this one ended, and how that was. `current` gives the
    caller of a job that was accepted before a restart as the keys of today have it.
    """

    def __init__(
        self,
        service: GenerationService,
        journal: SqliteJobStore,
        rules: JobPolicy,
        describe: Callable[[JobRecord], str],
        poster: WebhookTransport,
        record: DeviceRecord,
        current: Callable[[Caller], Caller] = lambda caller: caller,
    ) -> None:
        self._current = current
        self._service = service
        self._poster = poster
        self._clerk = AsyncJobStore(journal)
        self._rules = rules
        self._record = record
        self._runner = JobWorker(service, self._clerk, rules.at_once, describe, self._ended, rules.longest)
        self._admission = JobAdmission(self._runner, rules.most_waiting, rules.journal_bytes)
        self.fault = self._runner.progress.fault
        self._hooks = WebhookDispatcher(self._clerk, poster, rules.webhook_secret, rules.back_off)
        self._live: dict[str, JobHandle] = {}
        self._recent: OrderedDict[str, JobHandle] = OrderedDict()
        self._epoch = secrets.token_hex(4)
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._began = time.time() - time.monotonic()
        self.usable = False

    @property
    def waiting(self) -> int:
        """Accepted jobs that wait for their turn at the queue for the device."""
        return self._runner.waiting

    @property
    def running(self) -> int:
        """Accepted jobs that are being drawn, or stored."""
        return self._runner.running

    @property
    def unfinished(self) -> int:
        """Accepted jobs whose end is not written yet."""
        return self._runner.unfinished

    async def start(self) -> None:
        """Open the journal and go on with what it holds; a journal that cannot be opened is tried again later."""
        await self._open()
        self._tasks = [asyncio.create_task(work()) for work in (self._runner.run, self._hooks.run, self._keep_house)]
        self._runner.progress.watch_over(self._tasks)

    def drain(self) -> None:
        """Take no more jobs, begin none, and send those who follow one home. What is being drawn goes on."""
        self._closing = True
        self._runner.drain()
        for live in self._live.values():
            live.happenings.close()

    async def stop(self, grace: float) -> None:
        """Give what is being drawn `grace` seconds, and close the journal; it has the rest for the next start."""
        self.drain()
        await self._runner.stop(grace)
        for task in self._tasks:
            task.cancel()
        await self._clerk.close()
        self._record.end()
        self._poster.close()

    async def accept(
        self,
        order: GenerationRequest,
        caller: Caller,
        *,
        base: str = "",
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
        if claim is not None and (before := await self._clerk(SqliteJobStore.repeated, claim)) is not None:
            return replayed_job_id(claim, before)
        if order.webhook_url is not None:
            await self._service.validate(order)
            await self._poster.check(order.webhook_url, caller.share)
        settled, fetched = await self._service.prepare_for_storage(order, caller)
        now = time.time()
        entry = JobRecord(
            id=self._new_id() if job_id is None else scope_job_id(job_id, caller),
            caller=caller,
            accepted_at=now,
            deadline=None if order.timeout is None else now + order.timeout,
            base=base,
            webhook_url=order.webhook_url,
            share=caller.share,
            bytes=size_of(work := JobPayload(settled, fetched)),
        )
        # What is written is drawn, although its caller be gone meanwhile.
        return await asyncio.shield(asyncio.create_task(self._written(entry, work, claim)))

    async def enter(self, caller: Caller, job_id: str | None = None) -> JobHandle:
        """Let a request that waits for its answer be followed and cancelled by an id. Raises `RequestInProgress`."""
        live = self._registered(caller, self._new_id() if job_id is None else scope_job_id(job_id, caller))
        if job_id is None:
            return live
        known = None
        try:
            with suppress(JobStoreUnavailable):  # then no accepted job can be asked after either
                known = await self._clerk(SqliteJobStore.find, live.entry.id)
        except BaseException:
            del self._live[live.entry.id]
            raise
        if known is not None:
            del self._live[live.entry.id]
            raise stored_job_id()
        return live

    def leave(self, live: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Note how such a request was answered; it can be asked after for a while."""
        live.end(state, time.time(), outcome)
        live.tell_end()
        del self._live[live.entry.id]
        self._recent[live.entry.id] = live
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    async def standing(self, job_id: str, caller: Caller) -> JobStatus:
        """How a job stands. Raises `NotFound` for one that is not the caller's."""
        return visible_job_id(caller, await self._find(job_id, caller))

    async def listed(self, caller: Caller) -> list[JobStatus]:
        """The latest accepted jobs, newest first: the caller's own, everyone's for who manages.

        Raises `Forbidden` for an anonymous caller, whose jobs are known by their ids alone.
        """
        if caller.anonymous:
            raise Forbidden("Without a key jobs are not listed: each is known by its id alone.")
        entries = await self._clerk(SqliteJobStore.latest_of, None if caller.has_full_access else caller.owner, _LISTED)
        return [visible_job_id(caller, self._live.get(entry.id) or entry) for entry in entries]

    async def cancel(self, job_id: str, caller: Caller) -> JobStatus:
        """Take a job out of the queue or off the device; one that has ended stays as it is. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if not isinstance(found, JobHandle):
            return JobStatus.of(found)
        if not found.settled:
            await self._runner.cancel(found)
        return found.standing

    async def follow(self, job_id: str, caller: Caller, after: str | None) -> AsyncGenerator[JobEvent | None] | None:
        """The job's events after one of them, `None` among them when nothing happens for a while. Raises `NotFound`.

        `None` instead when that was the last one.
        """
        if after == END:
            return None
        found = await self._find(job_id, caller)
        return found.happenings.follow(after, _BEAT) if isinstance(found, JobHandle) else only_end(JobStatus.of(found))

    async def outcome(self, job_id: str, caller: Caller, seconds: float) -> JobStatus:
        """How an accepted job stands when it has ended, or when so many seconds are over. Raises `NotFound`."""
        found = await self._find(job_id, caller)
        if isinstance(found, JobHandle):
            with suppress(TimeoutError):  # it goes on without its caller
                async with asyncio.timeout(seconds):
                    await found.ended.wait()
        return visible_job_id(caller, found)

    def figures(self) -> tuple[int, int, int]:
        """Jobs that wait, jobs in the service's hands, and the bytes of the journal on the disk."""
        return self._runner.waiting, self._runner.running, self._clerk.bytes_on_disk()

    def _new_id(self) -> str:
        """An id no one can guess, of 128 random bits: of an anonymous caller's job it is all that is asked for."""
        return self._rules.id_prefix + secrets.token_urlsafe(16)

    def _check_open(self) -> None:
        if self._closing:
            raise NotReady("The server is going down.", retry_after=5)

    async def _written(
        self, entry: JobRecord, work: JobPayload, claim: IdempotencyClaim | None
    ) -> JobStatus | RecordedResponse:
        self._check_open()
        with self._admission.place(entry):
            live = self._registered(entry.caller, entry.id)
            live.entry = entry
            try:
                before = await self._clerk(SqliteJobStore.accept, entry, work, claim)
            except BaseException:
                del self._live[entry.id]
                raise
            if before is not None and claim is not None:
                del self._live[entry.id]
                return replayed_job_id(claim, before)
            # An earlier request of this id that only waited would hide it.
            self._recent.pop(entry.id, None)
            self._runner.put(live)
            return live.standing

    def _registered(self, caller: Caller, job_id: str) -> JobHandle:
        live = JobHandle(JobRecord(job_id, caller, time.time()), JobEventLog(self._epoch))
        if live.entry.id in self._live:
            raise stored_job_id()
        self._live[live.entry.id] = live
        return live

    async def _find(self, job_id: str, caller: Caller) -> JobHandle | JobRecord:
        """The job of that id, if the caller may follow it: others are not told that it exists."""
        for whole in dict.fromkeys((scope_job_id(job_id, caller), job_id)):
            found: JobHandle | JobRecord | None = self._live.get(whole) or self._recent.get(whole)
            if found is None:
                found = await self._clerk(SqliteJobStore.find, whole)
            owner = found.entry.caller if isinstance(found, JobHandle) else found.caller if found is not None else None
            if found is not None and owner is not None and caller.may_access_jobs_of(owner):
                return found
        raise NotFound("There is no such job.")

    def _ended(self, live: JobHandle) -> None:
        self._live.pop(live.entry.id, None)
        if live.entry.webhook_url is not None:
            self._hooks.wake()

    async def _open(self) -> None:
        try:
            await self._clerk(SqliteJobStore.open)
            entries = await self._clerk(SqliteJobStore.unfinished)
        except JobStoreUnavailable:
            self.usable = False
            return
        death = await asyncio.to_thread(self._record.begin)
        entries = attribute_crash(found := entries, death)
        with suppress(JobStoreUnavailable):  # told by the journal; what is not written counts in this process alone
            for entry in set(entries) - set(found):
                await self._clerk(SqliteJobStore.count_death, entry)
        self.usable = True
        if entries:
            _log.info("jobs are taken up again", jobs=len(entries))
        for entry in entries:
            caller = self._current(entry.caller)
            live = JobHandle(replace(entry, state=JobState.QUEUED, caller=caller), JobEventLog(self._epoch))
            self._live[entry.id] = live
            if entry.deaths >= MOST_DEATHS or entry.kills >= MOST_KILLS:
                await self._runner.give_up(live)
            else:
                self._runner.put(live)

    async def _keep_house(self) -> None:
        """Open a journal that could not be opened, and forget what is past, for ever."""
        while True:
            if not self.usable:
                await asyncio.sleep(self._rules.reopen)
                await self._open()
                continue
            # Not forgotten early because the clock was set forward meanwhile: by both clocks its time must be over.
            now, rules = min(time.time(), self._began + time.monotonic()), self._rules
            with suppress(JobStoreUnavailable):  # told by the journal, and tried again
                await self._clerk(
                    SqliteJobStore.expire, now - rules.keep_hours * _HOUR, now - rules.repeat_hours * _HOUR
                )
            await asyncio.sleep(_HOUSEKEEPING)
