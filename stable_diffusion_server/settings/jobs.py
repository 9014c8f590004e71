"""Settings of asynchronous jobs, webhooks, shutdown and the watchdog."""

from __future__ import annotations

import base64

from pydantic import Field, SecretStr, field_validator

from stable_diffusion_server.settings.base import SettingsGroup

_WEBHOOK_PREFIX = "whsec_"


class JobSettings(SettingsGroup):
    """How many jobs are accepted, how long they are kept, and when a stopping or hanging server is ended."""

    jobs_max_queued: int = Field(1000, ge=1, description="Maximum number of queued jobs; further ones get 429.")
    jobs_concurrency: int = Field(
        8,
        ge=1,
        le=1024,
        description="Jobs that are in the engine's queue at a time; keep it below QUEUE_LIMIT.",
    )
    event_streams: int = Field(
        256, ge=1, description="Maximum number of open event streams of jobs; further ones get 429."
    )
    event_streams_per_caller: int = Field(
        64, ge=1, description="The same per caller, who also gets at most half of all."
    )
    event_streams_per_job: int = Field(32, ge=1, description="The same per job.")
    job_store_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="Maximum size of the job store (`DATA_DIR/journal.db`) with its images; a full one refuses jobs.",
    )
    job_retention_hours: float = Field(
        24.0, gt=0, allow_inf_nan=False, description="Hours a finished job is kept and can be read."
    )
    idempotency_hours: float = Field(
        24.0, gt=0, allow_inf_nan=False, description="Hours a response is repeated for the same `Idempotency-Key`."
    )
    job_id_prefix: str = Field(
        "",
        pattern=r"^([A-Za-z0-9]{1,16}-)?$",
        description="Prefix of the job ids of this server, such as `r3-`, so that a load balancer can route by it.",
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description=(
            "Secret that signs webhooks (HMAC-SHA256): any text, or `whsec_` and base64. Empty: they are not signed."
        ),
    )
    shutdown_grace_seconds: float = Field(
        30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds that running requests may take after a stop signal.",
    )
    watchdog_timeout: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds without progress after which the watchdog restarts a server that has work. 0: never.",
    )

    @field_validator("webhook_secret")
    @classmethod
    def _can_sign(cls, value: SecretStr) -> SecretStr:
        secret = value.get_secret_value()
        try:
            key = secret.encode()
            if secret.startswith(_WEBHOOK_PREFIX):
                key = base64.b64decode(key[len(_WEBHOOK_PREFIX) :], validate=True)
        except ValueError:
            key = b""
        if secret and not key.strip():
            raise ValueError(
                "is no secret that can sign: any text in UTF-8, or whsec_ and base64 as Standard Webhooks has it"
            )
        return value
