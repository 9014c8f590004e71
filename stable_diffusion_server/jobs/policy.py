"""What the operator decides of jobs: how many, how large, for how long. Values alone."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.jobs.webhooks import BACK_OFF


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """How many jobs wait and are drawn at once, how long ends and answers are kept, what signs webhooks.

    `journal_bytes` is what jobs that have not ended may take, `id_prefix` is put before the ids made here. `back_off`
    are the seconds between tries to tell a webhook; `reopen` those between tries to open the journal; `longest`
    how many seconds one job is drawn for at the most.
    """

    most_waiting: int = 1000
    journal_bytes: int = 1_073_741_824
    at_once: int = 8
    keep_hours: float = 24.0
    repeat_hours: float = 24.0
    id_prefix: str = ""
    webhook_secret: str = ""
    back_off: tuple[float, ...] = BACK_OFF
    reopen: float = 5.0
    longest: float = 600.0
