"""Queue of waiting and running jobs: selects the next job, limits the queue, shares capacity between callers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from stable_diffusion_server.concurrency import describe_caller, may_hold_more
from stable_diffusion_server.errors import QueueFull
from stable_diffusion_server.jobs.store.records import JobRecord
from stable_diffusion_server.jobs.tracked_job import JobHandle

_RETRY_AFTER = 30
# Weight of the latest job in the moving average of seconds per job (0 to 1).
_SMOOTHING = 0.2


class JobQueue:
    """Waiting jobs in order, and up to `concurrency` running jobs. Not thread-safe: use it on the event loop only."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._waiting: dict[str, JobHandle] = {}
        self._running: dict[str, JobHandle] = {}
        self._seconds_per_job: float | None = None

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[JobHandle, ...]:
        """The running jobs."""
        return tuple(self._running.values())

    @property
    def bytes_held(self) -> int:
        """Stored bytes of all waiting and running jobs."""
        return sum(job.record.bytes for job in (*self._waiting.values(), *self._running.values()))

    def held_by(self, share: str) -> tuple[int, int]:
        """Return the number of waiting jobs of a share, and the stored bytes of its waiting and running jobs."""
        waiting = [job.record for job in self._waiting.values() if job.record.share == share]
        running = [job.record for job in self._running.values() if job.record.share == share]
        return len(waiting), sum(record.bytes for record in (*waiting, *running))

    def append(self, job: JobHandle) -> None:
        """Add a job at the end."""
        self._waiting[job.record.id] = job

    def requeue_first(self, job: JobHandle) -> None:
        """Move a running job to the front of the waiting jobs."""
        del self._running[job.record.id]
        self._waiting = {job.record.id: job, **self._waiting}

    def start_next(self) -> JobHandle | None:
        """Mark the next job as running and return it; `None` when no job may start now.

        The next job is the oldest job of the caller with the fewest running jobs. A job suspected of crashing the
        server runs alone.
        """
        if len(self._running) >= self._concurrency or any(job.suspect for job in self._running.values()):
            return None
        running = Counter(job.record.share for job in self._running.values())
        chosen = min(self._waiting.values(), key=lambda job: running[job.record.share], default=None)
        if chosen is None or (chosen.suspect and self._running):
            return None
        del self._waiting[chosen.record.id]
        self._running[chosen.record.id] = chosen
        return chosen

    def remove_waiting(self, job: JobHandle) -> bool:
        """Remove a waiting job; return whether it was waiting."""
        return self._waiting.pop(job.record.id, None) is not None

    def remove_running(self, job: JobHandle) -> None:
        """Remove a job that has ended."""
        self._running.pop(job.record.id, None)

    def record_duration(self, seconds: float) -> None:
        """Update the average job duration in seconds, from which `report_positions` estimates waiting times."""
        before = self._seconds_per_job
        self._seconds_per_job = seconds if before is None else (1 - _SMOOTHING) * before + _SMOOTHING * seconds

    def report_positions(self) -> None:
        """Report to each waiting job the number of jobs ahead of it and the estimated seconds until it ends."""
        each = self._seconds_per_job
        for position, job in enumerate(self._waiting.values(), len(self._running)):
            job.report_position(position, None if each is None else round(each * (position + 1), 1))


class JobAdmission:
    """Limits waiting jobs to `max_queued`, and their bytes to `max_bytes`; one caller cannot use all of either.

    A job counts as waiting while the store writes it. Not thread-safe: use it on the event loop only.
    """

    def __init__(self, queue: JobQueue, max_queued: int, max_bytes: int) -> None:
        self._queue = queue
        self._max_queued = max_queued
        self._max_bytes = max_bytes
        self._reserved: dict[str, JobRecord] = {}

    def check(self, share: str, size: int = 0) -> None:
        """Raise `QueueFull` if a job of `size` bytes may not be added now; the message names the exhausted limit."""
        reserved = self._reserved.values()
        own, own_bytes = self._queue.held_by(share)
        own += sum(record.share == share for record in reserved)
        own_bytes += sum(record.bytes for record in reserved if record.share == share)
        waiting = self._queue.waiting + len(reserved)
        free = self._max_queued - waiting
        if free <= 0:
            raise QueueFull(f"{waiting} jobs are waiting already.", retry_after=_RETRY_AFTER)
        if not may_hold_more(own, free):
            raise QueueFull(
                f"{waiting} jobs are waiting already, {own} of them for {describe_caller(share)}: "
                f"its share of {self._max_queued}.",
                retry_after=_RETRY_AFTER,
            )
        free_bytes = self._max_bytes - self._queue.bytes_held - sum(record.bytes for record in reserved) - size
        # If no space is free, the store itself rejects the job, since only the store knows the exact size.
        if own_bytes and free_bytes > 0 and not may_hold_more(own_bytes, free_bytes):
            raise QueueFull(
                f"Jobs of {describe_caller(share)} take {own_bytes} of JOB_STORE_BYTES={self._max_bytes}, its share.",
                retry_after=_RETRY_AFTER,
            )

    @contextmanager
    def reserve(self, record: JobRecord) -> Iterator[None]:
        """Count a job as waiting while the store writes it. Raises `QueueFull` as `check` does."""
        self.check(record.share, record.bytes)
        self._reserved[record.id] = record
        try:
            yield
        finally:
            del self._reserved[record.id]
