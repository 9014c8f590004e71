"""Base class of the settings groups, and types for lists written with commas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _split_folders(value: Any) -> Any:
    if isinstance(value, Path):
        return (value,)
    return _split_commas(value.replace(os.pathsep, ",")) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)]

# Folders separated by commas, or as in PATH.
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_folders), MinLen(1)]


def none_if_empty(value: Any) -> Any:
    """Read an empty text as None: `LORA_DIR=` means that there is no such folder, not the current one."""
    return value or None


class SettingsGroup(BaseSettings):
    """Settings of one subject: frozen, read from the environment and `.env`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, validate_default=True)
