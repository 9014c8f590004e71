"""Defines limits and retention times of jobs, which the operator configures."""

from __future__ import annotations

from dataclasses import dataclass

# The third crash during a job fails it. After the first crash it runs alone, so later crashes are attributed to it.
MAX_CRASHES = 3
# A kill from outside says nothing about the running job, but this many kills do.
MAX_KILLS = 100
# Seconds until the second, third, … try to deliver a webhook; the last value repeats.
WEBHOOK_BACKOFF = (5.0, 30.0, 120.0, 600.0, 3600.0)


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """Limits of waiting and running jobs, retention times of results, and webhook signing.

    `store_bytes` limits the stored bytes of unfinished jobs; every generated job id starts with `id_prefix`. Times are
    in seconds unless the name says hours: `reopen_seconds` is the pause between attempts to open the job store,
    `max_seconds` the time limit of one job.
    """

    max_queued: int = 1000
    store_bytes: int = 1_073_741_824
    concurrency: int = 8
    retention_hours: float = 24.0
    idempotency_hours: float = 24.0
    id_prefix: str = ""
    webhook_secret: str = ""
    webhook_backoff: tuple[float, ...] = WEBHOOK_BACKOFF
    reopen_seconds: float = 5.0
    max_seconds: float = 600.0
