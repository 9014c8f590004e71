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
MOST_DEATHS = 3
# Ends of the process from outside, as far as can be known, prove nothing of the job that was drawn; so many of them do.
MOST_KILLS = 100
_PATIENCE, _PATIENCE_WITH_DISKS = 0.5, 5.0
_TO_WRITE = 2.0
# So often a picture is drawn that could not be stored, while the storage seems to have room.
_MOST_UNSTORED = 5


class JobWorker:
    """The jobs that wait and those that are drawn. Lives on one event loop.

    `at_once` of them are in the service's hands at a time; `describe` writes the message a webhook is sent; `ended` is
    called with each job whose end is written. Each is drawn, or has failed, within `longest` seconds.
    """

    def __init__(
        self,
        service: GenerationService,
        clerk: AsyncJobStore,
        at_once: int,
        describe: Callable[[JobRecord], str],
        ended: Callable[[JobHandle], None],
        longest: float,
    ) -> None:
        self._service = service
        self._clerk = clerk
        self._at_once = at_once
        self._describe = describe
        self._ended = ended
        self._waiting: dict[str, JobHandle] = {}
        self._running: dict[str, JobHandle] = {}
        self._wake = asyncio.Event()
        self._draining = False
        self._seconds_per_job: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.progress = WorkerProgress(longest)

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
        waiting = [live.entry for live in self._waiting.values() if live.entry.share == share]
        running = [live.entry for live in self._running.values() if live.entry.share == share]
        return len(waiting), sum(entry.bytes for entry in (*waiting, *running))

    @property
    def bytes_held(self) -> int:
        """The bytes of all jobs that wait or are drawn."""
        return sum(live.entry.bytes for live in (*self._waiting.values(), *self._running.values()))

    @property
    def unfinished(self) -> int:
        """How many jobs wait or are drawn."""
        return self.waiting + self.running

    def put(self, live: JobHandle) -> None:
        """Let a job wait for its turn, at most until its deadline."""
        self._waiting[live.entry.id] = live
        if live.entry.deadline is not None:
            seconds = max(0.0, live.entry.deadline - time.time())
            live.due = time.monotonic() + seconds
            asyncio.get_running_loop().call_later(seconds, lambda: self._start(self._expire(live)))
        self._tell_positions()
        self._wake.set()

    async def run(self) -> None:
        """Draw what waits, until drained."""
        while not self._draining:
            self._wake.clear()
            if not self._open():
                await asyncio.sleep(_PATIENCE)
                continue
            while (live := self._next()) is not None:
                del self._waiting[live.entry.id]
                self._running[live.entry.id] = live
                self._start(self._see_through(live))
            self._tell_positions()
            await self._wake.wait()

    async def cancel(self, live: JobHandle) -> None:
        """Take a job out of the queue or off the device; returns when it has ended, whichever way."""
        live.cancelled = True
        if self._waiting.pop(live.entry.id, None) is not None:
            await self._end(live, JobState.CANCELLED, None)
        elif live.task is not None:
            live.task.cancel()
        await live.ended.wait()

    async def give_up(self, live: JobHandle) -> None:
        """End a job that has ended the process too often."""
        lost = live.entry.deaths if live.entry.deaths >= MOST_DEATHS else live.entry.kills
        error = PoisonJob(f"The server, or its device, was lost {lost} times while this was drawn.")
        _log.error("a job is given up", job_id=live.entry.id, deaths=live.entry.deaths, kills=live.entry.kills)
        await self._end(live, JobState.FAILED, StoredProblem.of(error))

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
        for live in self._running.values():
            if live.task is not None:
                live.task.cancel()
        if self._tasks:
            _, stuck = await asyncio.wait(self._tasks, timeout=_TO_WRITE)
            for task in stuck:
                task.cancel()

    def _open(self) -> bool:
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
        if len(self._running) >= self._at_once or any(live.suspect for live in self._running.values()):
            return None
        busy = Counter(live.entry.share for live in self._running.values())
        chosen = min(self._waiting.values(), key=lambda live: busy[live.entry.share], default=None)
        return None if chosen is None or (chosen.suspect and self._running) else chosen

    async def _see_through(self, live: JobHandle) -> None:
        """Draw a job and write down how it ended, or let it wait again."""
        started = time.monotonic()
        # Whatever is logged of it says so.
        structlog.contextvars.bind_contextvars(job_id=live.entry.id)
        if live.entry.caller.name:
            structlog.contextvars.bind_contextvars(key=live.entry.caller.name)
        live.task = asyncio.create_task(self._drawn(live))
        with self.progress.working():
            await asyncio.wait([live.task])
        try:
            state, outcome = JobState.DONE, live.task.result()
        except asyncio.CancelledError:
            if not live.cancelled:
                await self._put_back(live, forgiven=True)
                return
            state, outcome = JobState.CANCELLED, None
        except (QueueFull, NotReady):
            # The engine that failed under a job may have failed of it; that counts as a death.
            await self._put_back(live, forgiven=self._draining or live.entry.state is JobState.QUEUED)
            return
        except JobStoreUnavailable:
            await asyncio.sleep(_PATIENCE_WITH_DISKS)
            self._wait_again(live)
            return
        except DeviceLost:
            await self._put_back(live, forgiven=False)
            return
        except StorageUnavailable as error:
            if await self._waits_for_storage(live):
                return
            state, outcome = JobState.FAILED, StoredProblem.of(error)
        except ServerError as error:
            state, outcome = JobState.FAILED, StoredProblem.of(error)
        except Exception as error:  # whatever it is, it is this job's answer and no one else's
            _log.error("unexpected error", job_id=live.entry.id, exc_info=error)
            state, outcome = (
                JobState.FAILED,
                StoredProblem.of(ServerError("An unexpected error happened; the log has more.")),
            )
        self._learn((time.monotonic() - started) / len(self._running))
        await self._end(live, state, outcome)

    async def _drawn(self, live: JobHandle) -> GenerationResult | StoredProblem:
        """The receipt of a job, its attempt counted before anything is tried."""
        work = await self._clerk(SqliteJobStore.begin, live.entry.id)
        live.entry = replace(live.entry, attempts=live.entry.attempts + 1)
        order = work.order
        if live.due is not None:
            left = live.due - time.monotonic()
            if left <= 0:
                raise _too_late()
            order = replace(order, timeout=left)
        return await self._service.generate(
            order,
            caller=live.entry.caller,
            background=True,
            watch=live.news,
            previews=live.wants_previews,
            fetched=work.fetched,
            job_id=live.entry.id,
            suspect=live.suspect,
        )

    async def _put_back(self, live: JobHandle, *, forgiven: bool) -> None:
        """Let a job that was begun wait again; one that has ended the engine too often has failed."""
        if live.cancelled:
            await self._end(live, JobState.CANCELLED, None)
            return
        if not forgiven:
            await self._count_death(live)
        if live.entry.deaths >= MOST_DEATHS:
            await self.give_up(live)
        else:
            with suppress(JobStoreUnavailable):  # it says that the job was begun, and so it counts
                await self._clerk(SqliteJobStore.put_back, live.entry.id, forgiven=forgiven)
                live.entry = replace(live.entry, attempts=live.entry.attempts - forgiven)
            self._wait_again(live)

    async def _waits_for_storage(self, live: JobHandle) -> bool:
        """Let a job wait while the storage is down. Not one that fails again and again although there is room."""
        with suppress(ServerError):  # then it is not this job that is at fault
            await self._service.check_capacity(SubmissionContext(live.entry.caller, background=True))
            live.unstored += 1
            if live.unstored >= _MOST_UNSTORED:
                return False
        if not self._draining:
            await asyncio.sleep(_PATIENCE_WITH_DISKS)
        await self._put_back(live, forgiven=True)
        return True

    async def _count_death(self, live: JobHandle) -> None:
        live.entry = replace(live.entry, deaths=live.entry.deaths + 1)
        with suppress(JobStoreUnavailable):  # known here for as long as this process lives
            await self._clerk(SqliteJobStore.count_death, live.entry)

    def _wait_again(self, live: JobHandle) -> None:
        """Have a job wait before all others."""
        del self._running[live.entry.id]
        live.task = None
        live.entry = replace(live.entry, state=JobState.QUEUED)
        self._waiting = {live.entry.id: live, **self._waiting}
        self._wake.set()

    async def _expire(self, live: JobHandle) -> None:
        if self._waiting.pop(live.entry.id, None) is not None:
            await self._end(live, JobState.FAILED, StoredProblem.of(_too_late()))

    async def _end(self, live: JobHandle, state: JobState, outcome: GenerationResult | StoredProblem | None) -> None:
        """Write the end down and tell it. While it cannot be written it is told all the same, and tried again."""
        entry = live.end(state, time.time(), outcome)
        message = self._describe(entry) if entry.webhook_url is not None else None
        written = False
        while not written:
            try:
                await self._clerk(SqliteJobStore.end, entry, message)
                written = True
            except JobStoreUnavailable:
                _log.warning("the end of a job is not written yet", job_id=entry.id)
            self._running.pop(entry.id, None)
            self._wake.set()
            if not live.ended.is_set():
                live.tell_end()
            if not written:
                await asyncio.sleep(_PATIENCE_WITH_DISKS)
        self._ended(live)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _learn(self, seconds: float) -> None:
        before = self._seconds_per_job
        self._seconds_per_job = seconds if before is None else 0.8 * before + 0.2 * seconds

    def _tell_positions(self) -> None:
        each = self._seconds_per_job
        for position, live in enumerate(self._waiting.values(), len(self._running)):
            live.waits(position, None if each is None else round(each * (position + 1), 1))


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The picture was not stored before the job's timeout passed.")
