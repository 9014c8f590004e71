"""Draws accepted jobs, a few at a time and each caller in turn, until each has an end that is written down."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog

from stable_diffusion_server.errors import (
    DeadlineExceeded,
    DeviceLost,
    JobStoreUnavailable,
    NotReady,
    PoisonJob,
    QueueFull,
    ServerError,
    StorageUnavailable,
)
from stable_diffusion_server.generation import GenerationService, SubmissionContext
from stable_diffusion_server.jobs.runner_progress import WorkerProgress
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, StoredProblem
from stable_diffusion_server.jobs.store.sqlite_store import SqliteJobStore
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)

# The third death on one job is its last. After the first it has the device for itself, so that the next two are of
# nothing else.
MAX_CRASHES = 3
# Ends of the process from outside, as far as can be known, prove nothing of the job that was drawn; so many of them do.
MAX_KILLS = 100
_RETRY_SECONDS, _STORAGE_RETRY_SECONDS = 0.5, 5.0
_CANCEL_GRACE_SECONDS = 2.0
# So often a picture is drawn that could not be stored, while the storage seems to have room.
_MAX_STORAGE_FAILURES = 5


class JobWorker:
    """The jobs that wait and those that are drawn. Lives on one event loop.

    `concurrency` of them are in the service's hands at a time; `describe` writes the message a webhook is sent;
    `ended` is called with each job whose end is written. Each is drawn, or has failed, within `max_seconds` seconds.
    """

    def __init__(
        self,
        service: GenerationService,
        store: AsyncJobStore,
        concurrency: int,
        describe: Callable[[JobRecord], str],
        ended: Callable[[JobHandle], None],
        max_seconds: float,
    ) -> None:
        self._service = service
        self._store = store
        self._concurrency = concurrency
        self._describe = describe
        self._on_ended = ended
        self._waiting: dict[str, JobHandle] = {}
        self._running: dict[str, JobHandle] = {}
        self._wake = asyncio.Event()
        self._draining = False
        self._seconds_per_job: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress = WorkerProgress(max_seconds)

    @property
    def waiting(self) -> int:
        """How many jobs wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs are in the service's hands."""
        return len(self._running)

    def held_by(self, share: str) -> tuple[int, int]:
        """How many jobs of a share wait, and the bytes of all of its that have not ended."""
        waiting = [job.record for job in self._waiting.values() if job.record.share == share]
        running = [job.record for job in self._running.values() if job.record.share == share]
        return len(waiting), sum(record.bytes for record in (*waiting, *running))

    @property
    def bytes_held(self) -> int:
        """The bytes of all jobs that wait or are drawn."""
        return sum(job.record.bytes for job in (*self._waiting.values(), *self._running.values()))

    @property
    def unfinished(self) -> int:
        """How many jobs wait or are drawn."""
        return self.waiting + self.running

    def enqueue(self, job: JobHandle) -> None:
        """Let a job wait for its turn, at most until its deadline."""
        self._waiting[job.record.id] = job
        if job.record.deadline is not None:
            seconds = max(0.0, job.record.deadline - time.time())
            job.expires_at = time.monotonic() + seconds
            asyncio.get_running_loop().call_later(seconds, lambda: self._spawn(self._expire(job)))
        self._report_positions()
        self._wake.set()

    async def run(self) -> None:
        """Draw what waits, until drained."""
        while not self._draining:
            self._wake.clear()
            if not self._accepts_work():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            while (job := self._next()) is not None:
                del self._waiting[job.record.id]
                self._running[job.record.id] = job
                self._spawn(self._run_job(job))
            self._report_positions()
            await self._wake.wait()

    async def cancel(self, job: JobHandle) -> None:
        """Take a job out of the queue or off the device; returns when it has ended, whichever way."""
        job.cancelled = True
        if self._waiting.pop(job.record.id, None) is not None:
            await self._finish(job, JobState.CANCELLED, None)
        elif job.task is not None:
            job.task.cancel()
        await job.ended.wait()

    async def fail_poisoned(self, job: JobHandle) -> None:
        """End a job that has ended the process too often."""
        lost = job.record.crashes if job.record.crashes >= MAX_CRASHES else job.record.kills
        error = PoisonJob(f"The server, or its device, was lost {lost} times while this was drawn.")
        _log.error("a job is given up", job_id=job.record.id, crashes=job.record.crashes, kills=job.record.kills)
        await self._finish(job, JobState.FAILED, StoredProblem.from_error(error))

    def drain(self) -> None:
        """Begin no more jobs. What is being drawn goes on."""
        self._draining = True
        self.progress.watch_over(())
        self._wake.set()

    async def stop(self, grace: float) -> None:
        """Give what is being drawn `grace` seconds; what is not done then waits in the journal for the next start."""
        self.drain()
        if not self._tasks:
            return
        await asyncio.wait(self._tasks, timeout=grace)
        for job in self._running.values():
            if job.task is not None:
                job.task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=_CANCEL_GRACE_SECONDS)
            for task in stuck:
                task.cancel()

    def _accepts_work(self) -> bool:
        """Whether anything can be drawn now; a queue that is full, or models that load, are waited for."""
        if not self._waiting:
            return True
        try:
            self._service.check_open()
        except (QueueFull, NotReady):
            return False
        return True

    def _next(self) -> JobHandle | None:
        """The oldest job of a caller of whom the fewest are being drawn; a suspect when nothing else is."""
        if len(self._running) >= self._concurrency or any(job.suspect for job in self._running.values()):
            return None
        busy = Counter(job.record.share for job in self._running.values())
        chosen = min(self._waiting.values(), key=lambda job: busy[job.record.share], default=None)
        return None if chosen is None or (chosen.suspect and self._running) else chosen

    async def _run_job(self, job: JobHandle) -> None:
        """Draw a job and write down how it ended, or let it wait again."""
        started = time.monotonic()
        # Whatever is logged of it says so.
        structlog.contextvars.bind_contextvars(job_id=job.record.id)
        if job.record.caller.name:
            structlog.contextvars.bind_contextvars(key=job.record.caller.name)
        job.task = asyncio.create_task(self._generate(job))
        with self.progress.working():
            await asyncio.wait([job.task])
        try:
            state, outcome = JobState.DONE, job.task.result()
        except asyncio.CancelledError:
            if not job.cancelled:
                await self._requeue_or_fail(job, forgiven=True)
                return
            state, outcome = JobState.CANCELLED, None
        except (QueueFull, NotReady):
            # The engine that failed under a job may have failed of it; that counts as a death.
            await self._requeue_or_fail(job, forgiven=self._draining or job.record.state is JobState.QUEUED)
            return
        except JobStoreUnavailable:
            await asyncio.sleep(_STORAGE_RETRY_SECONDS)
            self._requeue(job)
            return
        except DeviceLost:
            await self._requeue_or_fail(job, forgiven=False)
            return
        except StorageUnavailable as error:
            if await self._retry_after_storage_failure(job):
                return
            state, outcome = JobState.FAILED, StoredProblem.from_error(error)
        except ServerError as error:
            state, outcome = JobState.FAILED, StoredProblem.from_error(error)
        except Exception as error:  # whatever it is, it is this job's answer and no one else's
            _log.error("unexpected error", job_id=job.record.id, exc_info=error)
            state, outcome = (
                JobState.FAILED,
                StoredProblem.from_error(ServerError("An unexpected error happened; the log has more.")),
            )
        self._update_estimate((time.monotonic() - started) / len(self._running))
        await self._finish(job, state, outcome)

    async def _generate(self, job: JobHandle) -> GenerationResult | StoredProblem:
        """The receipt of a job, its attempt counted before anything is tried."""
        payload = await self._store(SqliteJobStore.begin, job.record.id)
        job.record = replace(job.record, attempts=job.record.attempts + 1)
        request = payload.request
        if job.expires_at is not None:
            left = job.expires_at - time.monotonic()
            if left <= 0:
                raise _deadline_error()
            request = replace(request, timeout=left)
        return await self._service.generate(
            request,
            caller=job.record.caller,
            background=True,
            watch=job.report_progress,
            previews=job.wants_previews,
            fetched=payload.fetched,
            job_id=job.record.id,
            suspect=job.suspect,
        )

    async def _requeue_or_fail(self, job: JobHandle, *, forgiven: bool) -> None:
        """Let a job that was begun wait again; one that has ended the engine too often has failed."""
        if job.cancelled:
            await self._finish(job, JobState.CANCELLED, None)
            return
        if not forgiven:
            await self._record_crash(job)
        if job.record.crashes >= MAX_CRASHES:
            await self.fail_poisoned(job)
        else:
            with suppress(JobStoreUnavailable):  # it says that the job was begun, and so it counts
                await self._store(SqliteJobStore.requeue, job.record.id, forgiven=forgiven)
                job.record = replace(job.record, attempts=job.record.attempts - forgiven)
            self._requeue(job)

    async def _retry_after_storage_failure(self, job: JobHandle) -> bool:
        """Let a job wait while the storage is down. Not one that fails again and again although there is room."""
        with suppress(ServerError):  # then it is not this job that is at fault
            await self._service.check_capacity(SubmissionContext(job.record.caller, background=True))
            job.storage_failures += 1
            if job.storage_failures >= _MAX_STORAGE_FAILURES:
                return False
        if not self._draining:
            await asyncio.sleep(_STORAGE_RETRY_SECONDS)
        await self._requeue_or_fail(job, forgiven=True)
        return True

    async def _record_crash(self, job: JobHandle) -> None:
        job.record = replace(job.record, crashes=job.record.crashes + 1)
        with suppress(JobStoreUnavailable):  # known here for as long as this process lives
            await self._store(SqliteJobStore.save_crash_counts, job.record)

    def _requeue(self, job: JobHandle) -> None:
        """Have a job wait before all others."""
        del self._running[job.record.id]
        job.task = None
        job.record = replace(job.record, state=JobState.QUEUED)
        self._waiting = {job.record.id: job, **self._waiting}
        self._wake.set()

    async def _expire(self, job: JobHandle) -> None:
        if self._waiting.pop(job.record.id, None) is not None:
            await self._finish(job, JobState.FAILED, StoredProblem.from_error(_deadline_error()))

    async def _finish(self, job: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Write the end down and tell it. While it cannot be written it is told all the same, and tried again."""
        record = job.end(state, time.time(), outcome)
        message = self._describe(record) if record.webhook_url is not None else None
        written = False
        while not written:
            try:
                await self._store(SqliteJobStore.end, record, message)
                written = True
            except JobStoreUnavailable:
                _log.warning("the end of a job is not written yet", job_id=record.id)
            self._running.pop(record.id, None)
            self._wake.set()
            if not job.ended.is_set():
                job.publish_end()
            if not written:
                await asyncio.sleep(_STORAGE_RETRY_SECONDS)
        self._on_ended(job)

    def _spawn(self, payload: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(payload)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _update_estimate(self, seconds: float) -> None:
        before = self._seconds_per_job
        self._seconds_per_job = seconds if before is None else 0.8 * before + 0.2 * seconds

    def _report_positions(self) -> None:
        each = self._seconds_per_job
        for position, job in enumerate(self._waiting.values(), len(self._running)):
            job.report_position(position, None if each is None else round(each * (position + 1), 1))


def _deadline_error() -> DeadlineExceeded:
    return DeadlineExceeded("The picture was not stored before the job's timeout passed.")
