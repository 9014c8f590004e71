"""What groups of settings have in common: how lists are written, and that nothing changes after the start."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)]


class SettingsGroup(BaseSettings):
    """Settings that belong together."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, validate_default=True)
