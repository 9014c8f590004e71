"""Settings of API keys and of the limits per caller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from stable_diffusion_server.settings.api_keys import ApiKey, is_rate, parse_keys
from stable_diffusion_server.settings.base import Secrets, SettingsGroup, none_if_empty


class AuthSettings(SettingsGroup):
    """Who may generate images, and how many."""

    api_keys: Secrets = Field(
        (),
        description=(
            "API keys, separated by commas: the secret alone, or "
            "`name:secret;rate=60/minute;concurrency=4;prefix=team-a/;admin`. A single key is admin; of several keys, "
            "those marked `admin` may list, read and delete the images of the others. Empty: no key is needed."
        ),
    )
    api_keys_file: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None, description="File with more keys, one per line, in the format of API_KEYS; `#` starts a comment."
    )
    allow_anonymous: bool = Field(
        False,
        description="1 lets anyone generate images without a key, isolated from all others; see docs/security.md.",
    )
    rate_limit: str = Field(
        "",
        description=(
            "Maximum rate of image requests per key, or per address where no key is needed, such as `60/minute`. "
            "Empty: unlimited."
        ),
    )
    concurrency_limit: int = Field(
        0, ge=0, description="Maximum number of concurrent image requests, counted like RATE_LIMIT; 0: unlimited."
    )

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        parse_keys(key.get_secret_value() for key in value)
        return value

    @field_validator("api_keys_file")
    @classmethod
    def _holds_keys(cls, value: Path | None) -> Path | None:
        parse_keys(_key_lines(value))
        return value

    @field_validator("rate_limit")
    @classmethod
    def _is_request_rate(cls, value: str) -> str:
        if value and not is_rate(value):
            raise ValueError(f"{value!r} is not a rate such as 60/minute")
        return value

    def read_keys(self) -> tuple[ApiKey, ...]:
        """Return the keys of API_KEYS and API_KEYS_FILE. Raises `ValueError` naming the setting that is wrong."""
        return parse_keys([*(key.get_secret_value() for key in self.api_keys), *_key_lines(self.api_keys_file)])


def _key_lines(file: Path | None) -> list[str]:
    """Return the lines of a key file that are not empty, without comments."""
    if file is None:
        return []
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
    return [line for line in lines if line]
