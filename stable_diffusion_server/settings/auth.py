"""Settings of API keys and of the limits per caller, with the syntax of the list of keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import limits
from pydantic import BeforeValidator, Field, SecretStr, field_validator

from stable_diffusion_server.settings.base import Secrets, SettingsGroup, none_if_empty

_NAMED = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_.-]{0,31}):(?P<secret>.+)")
_OPTIONS = ("rate", "concurrency", "prefix", "models")
_ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its limits.

    `rate` is a text such as `60/minute`, empty for RATE_LIMIT; `concurrency` 0 means CONCURRENCY_LIMIT. `prefix`, with
    a slash at its end, is the only folder of the bucket the key may write to; empty: all. `models` names the models
    that the key may use; empty: all. An `admin` key may list, read and delete the images of other keys, and use all
    models.
    """

    name: str
    secret: SecretStr
    rate: str = ""
    concurrency: int = 0
    prefix: str = ""
    admin: bool = False
    models: tuple[str, ...] = ()


def parse_keys(texts: Iterable[str]) -> tuple[ApiKey, ...]:
    """Parse keys such as `name:secret;rate=60/minute;concurrency=4;prefix=team-a/;models=sdxl|flux`.

    Only the secret is required; `admin` stands alone.

    A single key is always admin. Raises `ValueError` with a sentence that holds no part of any secret.
    """
    keys = tuple(_parse(number, text) for number, text in enumerate(texts, 1))
    for what, values in (("name", [k.name for k in keys]), ("secret", [k.secret.get_secret_value() for k in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"holds two keys of one {what}")
    return keys if len(keys) > 1 else tuple(replace(key, admin=True) for key in keys)


def is_rate(text: str) -> bool:
    """Return whether a text is a rate such as `60/minute`."""
    try:
        return limits.parse(text).amount > 0
    except ValueError:
        return False


def _parse(number: int, text: str) -> ApiKey:
    first, *rest = (part.strip() for part in text.split(";"))
    named = _NAMED.fullmatch(first)
    secret = named["secret"] if named else first
    if not re.fullmatch(r"[!-~]+", secret):
        raise ValueError("holds a key with blanks or characters beyond ASCII, which no header can carry")
    assignments = [part for part in rest if part != _ADMIN]
    options = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in assignments)}
    if len(options) < len(assignments) or len(rest) - len(assignments) > 1 or not set(options) <= set(_OPTIONS):
        raise ValueError(f"has options at key {number} other than {', '.join(_OPTIONS)} and {_ADMIN}, each once")
    rate, concurrency, prefix, models = (options.get(name, "") for name in _OPTIONS)
    if "rate" in options and not is_rate(rate):
        raise ValueError(f"has a rate at key {number} that is not like 60/minute")
    if "concurrency" in options and not re.fullmatch(r"[1-9]\d{0,4}", concurrency):
        raise ValueError(f"has a concurrency at key {number} that is not a number from 1")
    return ApiKey(
        named["name"] if named else _derived_name(secret),
        SecretStr(secret),
        rate,
        int(concurrency or 0),
        _parse_prefix(number, prefix) if "prefix" in options else "",
        admin=_ADMIN in rest,
        models=_parse_models(number, models, admin=_ADMIN in rest) if "models" in options else (),
    )


def _parse_prefix(number: int, prefix: str) -> str:
    parts = prefix.removesuffix("/").split("/")
    if not all(parts) or {".", ".."} & set(parts) or not prefix.isprintable() or "\\" in prefix:
        raise ValueError(f"has a prefix at key {number} that is not a folder such as team-a/")
    return "/".join(parts) + "/"


def _parse_models(number: int, models: str, *, admin: bool) -> tuple[str, ...]:
    names = tuple(name.strip() for name in models.split("|"))
    if admin:
        raise ValueError(f"has models at key {number}, which is {_ADMIN} and may use all")
    if not all(names) or not models.isprintable():
        raise ValueError(f"has models at key {number} that are not names separated by |")
    return tuple(dict.fromkeys(names))


def _derived_name(secret: str) -> str:
    """Derive the name of a key that has none. It does not depend on other keys, and PBKDF2 makes guessing slow."""
    return "key-" + hashlib.pbkdf2_hmac("sha256", secret.encode(), b"name of a key", 100_000, 4).hex()


class AuthSettings(SettingsGroup):
    """Who may generate images, and how many."""

    api_keys: Secrets = Field(
        (),
        description=(
            "API keys, separated by commas: the secret alone, or "
            "`name:secret;rate=60/minute;concurrency=4;prefix=team-a/;models=sdxl` or `name:secret;admin`. `models` "
            "are the only ones that the key may use, separated by vertical bars. A single key is admin; of several "
            "keys, those marked `admin` may list, read and delete the images of the others, and use all models. Empty: "
            "no key is needed."
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
        keys = parse_keys([*(key.get_secret_value() for key in self.api_keys), *_key_lines(self.api_keys_file)])
        if len(keys) == 1 and keys[0].models:
            raise ValueError("limits the models of the only key, which is admin; add another key")
        return keys


def _key_lines(file: Path | None) -> list[str]:
    """Return the lines of a key file that are not empty, without comments."""
    if file is None:
        return []
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
    return [line for line in lines if line]
