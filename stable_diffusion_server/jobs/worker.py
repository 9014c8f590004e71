"""Background worker: generates the images of accepted jobs, with retries, until each job's end is stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog

from stable_diffusion_server.concurrency import ProgressMonitor
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
from stable_diffusion_server.jobs.job_queue import JobQueue
from stable_diffusion_server.jobs.policy import MAX_CRASHES
from stable_diffusion_server.jobs.store.async_store import AsyncJobStore
from stable_diffusion_server.jobs.store.records import JobRecord, JobState, StoredProblem
from stable_diffusion_server.jobs.tracked_job import JobHandle
from stable_diffusion_server.types import GenerationResult

_log = structlog.get_logger(__name__)

_RETRY_SECONDS, _STORAGE_RETRY_SECONDS = 0.5, 5.0
# Grace time at shutdown for cancelled jobs to store their state.
_CANCEL_GRACE_SECONDS = 2.0
# A job fails after this many storage failures while the storage reported free capacity.
_MAX_STORAGE_FAILURES = 5
# Jobs count as stalled when none has ended for `max_seconds` plus this slack.
_STALL_SLACK_SECONDS = 30.0


class JobWorker:
    """Runs up to `concurrency` jobs at a time. Not thread-safe: use it on one event loop.

    `describe` renders a finished job as webhook message, or `None` for no message. The worker calls `on_ended` with
    each job whose end is stored. Each job ends within `max_seconds`.
    """

    def __init__(
        self,
        service: GenerationService,
        store: AsyncJobStore,
        concurrency: int,
        describe: Callable[[JobRecord], str | None],
        on_ended: Callable[[JobHandle], None],
        max_seconds: float,
    ) -> None:
        self._service = service
        self._store = store
        self._describe = describe
        self._on_ended = on_ended
        self.queue = JobQueue(concurrency)
        self._wake = asyncio.Event()
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._monitor = ProgressMonitor(max_seconds + _STALL_SLACK_SECONDS)
        self._supervised: Sequence[asyncio.Task[None]] = ()

    def supervise(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Make `health` report a fault when one of these tasks ends. An empty sequence stops the supervision."""
        self._supervised = tasks

    def health(self) -> str | None:
        """Return one sentence that says why accepted jobs make no progress; `None` while they progress."""
        if silent := self._monitor.stalled_seconds():
            count = self._monitor.pending
            return f"Accepted jobs make no progress: {count} are under way, and none ended in {silent:.0f} seconds."
        if any(task.done() for task in self._supervised):
            return "Accepted jobs make no progress: what tends them has ended, and the log says why."
        return None

    def enqueue(self, job: JobHandle) -> None:
        """Add a job to the queue; if it still waits at its deadline, it fails."""
        self.queue.append(job)
        if job.record.deadline is not None:
            seconds = max(0.0, job.record.deadline - time.time())
            job.expires_at = time.monotonic() + seconds
            asyncio.get_running_loop().call_later(seconds, lambda: self._spawn(self._expire(job)))
        self.queue.report_positions()
        self._wake.set()

    async def run(self) -> None:
        """Start waiting jobs, until `drain`."""
        while not self._draining:
            self._wake.clear()
            if not self._accepts_work():
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            while (job := self.queue.start_next()) is not None:
                self._spawn(self._run_job(job))
            self.queue.report_positions()
            await self._wake.wait()

    async def cancel(self, job: JobHandle) -> None:
        """Cancel a waiting or running job; return when it has ended, cancelled or not."""
        job.cancelled = True
        if self.queue.remove_waiting(job):
            await self._finish(job, JobState.CANCELLED, None)
        elif job.task is not None:
            job.task.cancel()
        await job.ended.wait()

    async def fail_poisoned(self, job: JobHandle) -> None:
        """Fail a job that crashed the server or the device too often."""
        record = job.record
        lost = record.crashes if record.crashes >= MAX_CRASHES else record.kills
        error = PoisonJob(f"The server, or its device, was lost {lost} times while this was drawn.")
        _log.error("a job crashed the server too often and fails", job_id=record.id, crashes=lost, kills=record.kills)
        await self._finish(job, JobState.FAILED, StoredProblem.from_error(error))

    def drain(self) -> None:
        """Start no more jobs. Running jobs continue."""
        self._draining = True
        self.supervise(())
        self._wake.set()

    async def stop(self, grace: float) -> None:
        """Drain and wait up to `grace` seconds for running jobs; the store keeps the others for the next start."""
        self.drain()
        if not self._tasks:
            return
        await asyncio.wait(self._tasks, timeout=grace)
        for job in self.queue.running:
            if job.task is not None:
                job.task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=_CANCEL_GRACE_SECONDS)
            for task in stuck:
                task.cancel()

    def _accepts_work(self) -> bool:
        """Return whether a job may start; `False` while the engine's queue is full or models load."""
        if not self.queue.waiting:
            return True
        try:
            self._service.check_open()
        except (QueueFull, NotReady):
            return False
        return True

    async def _run_job(self, job: JobHandle) -> None:
        """Run a job and store its end, or requeue it."""
        started = time.monotonic()
        structlog.contextvars.bind_contextvars(job_id=job.record.id)
        if job.record.caller.name:
            structlog.contextvars.bind_contextvars(key=job.record.caller.name)
        job.task = asyncio.create_task(self._generate(job))
        with self._monitor.track():
            await asyncio.wait([job.task])
        try:
            end: tuple[JobState, GenerationResult | StoredProblem | None] = JobState.DONE, job.task.result()
        except asyncio.CancelledError:
            if not job.cancelled:
                await self._requeue_or_fail(job, forgiven=True)
                return
            end = JobState.CANCELLED, None
        except (QueueFull, NotReady):
            # If the engine failed while the job ran, the job may be the cause: count it as a crash.
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
            end = JobState.FAILED, StoredProblem.from_error(error)
        except ServerError as error:
            end = JobState.FAILED, StoredProblem.from_error(error)
        except Exception as error:  # an unexpected error fails this job only
            _log.error("unexpected error", job_id=job.record.id, exc_info=error)
            opaque = ServerError("An unexpected error happened; the log has more.")
            end = JobState.FAILED, StoredProblem.from_error(opaque)
        self.queue.record_duration((time.monotonic() - started) / len(self.queue.running))
        await self._finish(job, *end)

    async def _generate(self, job: JobHandle) -> GenerationResult:
        """Count the attempt in the store, then generate the image."""
        payload = await self._store.begin_attempt(job.record.id)
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
        """Requeue an interrupted job; fail it after `MAX_CRASHES` crashes. `forgiven`: do not count a crash."""
        if job.cancelled:
            await self._finish(job, JobState.CANCELLED, None)
            return
        if not forgiven:
            await self._record_crash(job)
        if job.record.crashes >= MAX_CRASHES:
            await self.fail_poisoned(job)
        else:
            with suppress(JobStoreUnavailable):  # on failure the store still counts the attempt, so keep it
                await self._store.requeue(job.record.id, forgiven=forgiven)
                job.record = replace(job.record, attempts=job.record.attempts - forgiven)
            self._requeue(job)

    async def _retry_after_storage_failure(self, job: JobHandle) -> bool:
        """Requeue a job while the storage is down. `False` if uploads keep failing while there is capacity."""
        with suppress(ServerError):  # no capacity: do not count the failure against this job
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
        with suppress(JobStoreUnavailable):  # on failure this process counts in memory
            await self._store.save_crash_counts(job.record)

    def _requeue(self, job: JobHandle) -> None:
        """Move a running job to the front of the queue."""
        self.queue.requeue_first(job)
        job.task = None
        job.record = replace(job.record, state=JobState.QUEUED)
        self._wake.set()

    async def _expire(self, job: JobHandle) -> None:
        if self.queue.remove_waiting(job):
            await self._finish(job, JobState.FAILED, StoredProblem.from_error(_deadline_error()))

    async def _finish(self, job: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Store and publish a job's end. If the store fails, publish the end anyway and retry the store."""
        record = job.finish(state, time.time(), outcome)
        message = self._describe(record) if record.webhook_url is not None else None
        stored = False
        while not stored:
            try:
                await self._store.finish(record, message)
                stored = True
            except JobStoreUnavailable:
                _log.warning("the end of a job is not stored yet", job_id=record.id)
            self.queue.remove_running(job)
            self._wake.set()
            if not job.ended.is_set():
                job.publish_end()
            if not stored:
                await asyncio.sleep(_STORAGE_RETRY_SECONDS)
        self._on_ended(job)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _deadline_error() -> DeadlineExceeded:
    return DeadlineExceeded("The picture was not stored before the job's timeout passed.")
