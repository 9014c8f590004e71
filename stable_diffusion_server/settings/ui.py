"""Settings of the web UI."""

from __future__ import annotations

from pydantic import Field, field_validator

from stable_diffusion_server.settings.api_keys import is_rate
from stable_diffusion_server.settings.base import SettingsGroup


class UiSettings(SettingsGroup):
    """Whether there is a web UI, and how much memory its uploads may take."""

    ui: bool = Field(True, description="0 disables the web UI at `/ui`.")
    ui_rate_limit: str = Field(
        "1200/minute",
        description=(
            "Maximum rate of UI events per visitor; events that generate images also count for RATE_LIMIT. "
            "Empty: unlimited."
        ),
    )
    ui_uploads: int = Field(
        16, ge=2, description="Maximum number of uploaded images kept per visitor; the oldest is dropped first."
    )
    ui_upload_bytes: int = Field(
        100_663_296, ge=1024, description="Maximum bytes of uploaded images kept in memory per visitor."
    )
    ui_upload_total_bytes: int = Field(
        268_435_456,
        ge=1024,
        description="The same for all visitors together; the visitor with the most bytes loses the oldest first.",
    )
    ui_upload_seconds: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds an uploaded image is kept after its last use.",
    )

    @field_validator("ui_rate_limit")
    @classmethod
    def _is_event_rate(cls, value: str) -> str:
        if value and not is_rate(value):
            raise ValueError(f"{value!r} is not a rate such as 60/minute")
        return value
