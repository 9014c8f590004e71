"""Limits and retention times of jobs, as the operator configures them."""

from __future__ import annotations

from dataclasses import dataclass

# The third crash during one job fails it. After the first crash it runs alone, so later ones can be attributed to it.
MAX_CRASHES = 3
# Kills from outside say nothing about the job that ran; this many do.
MAX_KILLS = 100
# Seconds until the second, third, … try to deliver a webhook; the last value repeats.
WEBHOOK_BACKOFF = (5.0, 30.0, 120.0, 600.0, 3600.0)


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """How many jobs wait and run, how long results are kept, and how webhooks are signed.

    `store_bytes` limits the stored bytes of unfinished jobs; `id_prefix` starts every generated job id. All times are
    in seconds, except where the name says hours: `reopen_seconds` between tries to open the job store, `max_seconds`
    for one job.
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
