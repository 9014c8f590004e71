"""What the operator decides of jobs: how many, how large, for how long. Values alone."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.jobs.webhooks import WEBHOOK_BACKOFF


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """How many jobs wait and are drawn at once, how long ends and answers are kept, what signs webhooks.

    `store_bytes` is what jobs that have not ended may take, `id_prefix` is put before the ids made here.
    `webhook_backoff` are the seconds between tries to tell a webhook; `reopen_seconds` those between tries to open the
    journal; `max_seconds` how many seconds one job is drawn for at the most.
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
