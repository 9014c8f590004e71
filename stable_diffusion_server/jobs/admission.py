"""Whether one more job may wait: how many may, how much they may take, and how callers share both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from stable_diffusion_server.concurrency import describe_caller, may_hold_more
from stable_diffusion_server.errors import QueueFull
from stable_diffusion_server.jobs.store.records import JobRecord

_RETRY_AFTER = 30


class HeldCapacity(Protocol):
    """What the jobs that have not ended take."""

    @property
    def waiting(self) -> int:
        """How many wait."""

    @property
    def bytes_held(self) -> int:
        """The bytes of all of them."""

    def held_by(self, share: str) -> tuple[int, int]:
        """How many of a share wait, and the bytes of all of its."""


class JobAdmission:
    """Room for `max_queued` jobs and `most_bytes`, of which nobody gets all. Lives on one event loop.

    Jobs that are just being written down count as waiting.
    """

    def __init__(self, held: HeldCapacity, max_queued: int, most_bytes: int) -> None:
        self._held = held
        self._most_waiting = max_queued
        self._most_bytes = most_bytes
        self._entering: dict[str, JobRecord] = {}

    def check(self, share: str, size: int = 0) -> None:
        """Raise `QueueFull` where a job of that many bytes may not wait now; it says whose share is used up."""
        entering = self._entering.values()
        mine, mine_bytes = self._held.held_by(share)
        mine += sum(record.share == share for record in entering)
        mine_bytes += sum(record.bytes for record in entering if record.share == share)
        waiting = self._held.waiting + len(entering)
        free = self._most_waiting - waiting
        if free <= 0:
            raise QueueFull(f"{waiting} jobs are waiting already.", retry_after=_RETRY_AFTER)
        if not may_hold_more(mine, free):
            raise QueueFull(
                f"{waiting} jobs are waiting already, {mine} of them for {describe_caller(share)}: "
                f"its share of {self._most_waiting}.",
                retry_after=_RETRY_AFTER,
            )
        left = self._most_bytes - self._held.bytes_held - sum(record.bytes for record in entering) - size
        # One that has no room at all is refused by the journal, which knows exactly.
        if mine_bytes and left > 0 and not may_hold_more(mine_bytes, left):
            raise QueueFull(
                f"Jobs of {describe_caller(share)} take {mine_bytes} of JOB_STORE_BYTES={self._most_bytes}, its share.",
                retry_after=_RETRY_AFTER,
            )

    @contextmanager
    def reserve(self, record: JobRecord) -> Iterator[None]:
        """Hold room for a job while it is written down. Raises as `check` does."""
        self.check(record.share, record.bytes)
        self._entering[record.id] = record
        try:
            yield
        finally:
            del self._entering[record.id]
