"""All settings of the server as one frozen value."""

from __future__ import annotations

from pydantic import model_validator

from stable_diffusion_server.settings.auth import AuthSettings
from stable_diffusion_server.settings.credentials import CredentialsSettings
from stable_diffusion_server.settings.http import HttpSettings, UiSettings
from stable_diffusion_server.settings.jobs import JobSettings
from stable_diffusion_server.settings.limits import LimitSettings
from stable_diffusion_server.settings.models import ModelSettings
from stable_diffusion_server.settings.observability import ObservabilitySettings
from stable_diffusion_server.settings.storage import StorageSettings

# In the order of the table in docs/settings.md.
GROUPS = (
    HttpSettings,
    AuthSettings,
    UiSettings,
    StorageSettings,
    CredentialsSettings,
    JobSettings,
    ModelSettings,
    LimitSettings,
    ObservabilitySettings,
)


class Settings(
    HttpSettings,
    AuthSettings,
    UiSettings,
    StorageSettings,
    CredentialsSettings,
    JobSettings,
    ModelSettings,
    LimitSettings,
    ObservabilitySettings,
):
    """Every setting. A name is that of the environment variable, in any case of letters; `.env` is read too.

    A `Settings` is a value of each group as well, so a function takes the group it needs.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        bucket, data = self.local_bucket_dir.resolve(), self.data_dir.resolve()
        if bucket == data or bucket in data.parents or data in bucket.parents:
            raise ValueError("LOCAL_BUCKET_DIR and DATA_DIR must not contain one another")
        if fault := self.storage_fault() or self.credentials_fault():
            raise ValueError(fault)
        try:
            self.read_keys()
        except ValueError as error:
            raise ValueError(f"API_KEYS with API_KEYS_FILE {error}") from None
        if self.min_side > self.max_side:
            raise ValueError("MIN_SIDE is larger than MAX_SIDE")
        return self
