"""All settings of the server, as one frozen value."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stable_diffusion_server.settings.http import HttpSettings
from stable_diffusion_server.settings.jobs import JobSettings
from stable_diffusion_server.settings.limits import LimitSettings
from stable_diffusion_server.settings.models import ModelSettings
from stable_diffusion_server.settings.storage import StorageSettings


class Settings(JobSettings, LimitSettings, StorageSettings, ModelSettings, HttpSettings):
    """Every setting of the server. Names are those of environment variables, in any case; `.env` is read too."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`console` for people, `json` for machines; `auto`: people at a terminal."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        bucket, data = self.local_bucket_dir.resolve(), self.data_dir.resolve()
        if bucket == data or bucket in data.parents or data in bucket.parents:
            raise ValueError("LOCAL_BUCKET_DIR and DATA_DIR must not contain one another")
        if self.storage_provider != "local" and not self.bucket_name:
            raise ValueError(f"BUCKET_NAME is needed with STORAGE_PROVIDER={self.storage_provider}")
        if self.storage_provider == "r2" and not self.r2_endpoint_url:
            raise ValueError("R2_ENDPOINT_URL is needed with STORAGE_PROVIDER=r2")
        try:
            self.read_keys()
        except ValueError as error:
            raise ValueError(f"API_KEYS with API_KEYS_FILE {error}") from None
        if self.min_side > self.max_side:
            raise ValueError("MIN_SIDE is larger than MAX_SIDE")
        return self
