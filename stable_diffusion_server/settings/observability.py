"""Settings of logs and traces."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stable_diffusion_server.settings.base import SettingsGroup


class ObservabilitySettings(SettingsGroup):
    """What is logged, and where traces go."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`console`: text; `json`: one object per line; `auto`: `console` on a terminal."
    )
    log_prompts: bool = Field(False, description="1 logs the prompts of generated images; by default none is logged.")
    otel_exporter_otlp_endpoint: str = Field(
        "",
        description=(
            "URL of an OpenTelemetry collector that receives traces over HTTP, such as `http://localhost:4318`; needs "
            "`tracing-requirements.txt`. Empty: no traces."
        ),
    )

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _is_collector_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError("is not an http or https address without credentials")
        if value and find_spec("opentelemetry.exporter") is None:
            raise ValueError("needs the packages of tracing-requirements.txt, which are not installed")
        return value
