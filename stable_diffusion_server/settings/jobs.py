"""How jobs are kept, told and ended."""

from __future__ import annotations

import base64

from pydantic import Field, SecretStr, field_validator

from stable_diffusion_server.settings.base import SettingsGroup


class JobSettings(SettingsGroup):
    """Accepted jobs, idempotency keys, webhooks, stopping and hanging."""

    jobs_max_queued: int = Field(1000, ge=1, description="Accepted jobs that may wait; one more is answered 429.")
    jobs_concurrency: int = Field(
        8, ge=1, le=1024, description="Accepted jobs that are in the queue for the device at a time; keep it below it."
    )
    event_streams: int = Field(256, ge=1, description="Clients that follow the events of jobs at a time; more: 429.")
    event_streams_per_caller: int = Field(64, ge=1, description="Those of one caller, who has half of all at the most.")
    event_streams_per_job: int = Field(32, ge=1, description="Those of one job.")
    job_store_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        description="Largest journal of jobs, with their pictures; a full one refuses jobs.",
    )
    job_retention_hours: float = Field(
        24.0, gt=0, allow_inf_nan=False, description="Hours an accepted job that has ended can be asked after."
    )
    idempotency_hours: float = Field(
        24.0, gt=0, allow_inf_nan=False, description="Hours the answer to an `Idempotency-Key` is repeated."
    )
    job_id_prefix: str = Field(
        "",
        pattern=r"^([A-Za-z0-9]{1,16}-)?$",
        description="Put before the ids this server makes for jobs, as in `r3-`: what balances servers can tell whose "
        "a job is. Empty: nothing.",
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs what is sent to a `webhook_url` (HMAC-SHA256): a text, or `whsec_` and base64. Empty: it is "
        "not signed.",
    )
    shutdown_grace_seconds: float = Field(
        30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds what is being drawn may go on after a stop signal.",
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
        prefix = "whsec_"
        try:
            encoded = secret.encode()
            key = base64.b64decode(encoded[len(prefix) :], validate=True) if secret.startswith(prefix) else encoded
        except ValueError:
            key = b""
        if secret and not key.strip():
            raise ValueError(
                "is no secret that can sign: any text in UTF-8, or whsec_ and base64 as Standard Webhooks has it"
            )
        return value
