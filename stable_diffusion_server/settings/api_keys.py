"""How an API key is written in the settings: its name, its secret, and what it may. Knows no requests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import limits
from pydantic import SecretStr

_NAMED = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_.-]{0,31}):(?P<secret>.+)")
_OPTIONS = ("rate", "concurrency", "prefix")
_MARK = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key: `rate` as in `60/minute` (empty: as RATE_LIMIT), `concurrency` 0 as CONCURRENCY_LIMIT.

    `prefix` is the only part of the bucket's names it may write, with a slash at its end; empty: all of them. `admin`:
    it may list, read and delete what other keys made.
    """

    name: str
    secret: SecretStr
    rate: str = ""
    concurrency: int = 0
    prefix: str = ""
    admin: bool = False


def parse_keys(written: Iterable[str]) -> tuple[ApiKey, ...]:
    """Keys from `name:secret;rate=60/minute;concurrency=4;prefix=team-a/;admin`: all but the secret may be left out.

    A sole key is admin, marked or not. Raises `ValueError` with a sentence that holds no part of any secret.
    """
    keys = tuple(_parse(number, text) for number, text in enumerate(written, 1))
    for what, values in (("name", [k.name for k in keys]), ("secret", [k.secret.get_secret_value() for k in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"holds two keys of one {what}")
    return keys if len(keys) > 1 else tuple(replace(key, admin=True) for key in keys)


def is_rate(text: str) -> bool:
    """Whether this is a rate such as `60/minute`."""
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
    valued = [part for part in rest if part != _MARK]
    options = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in valued)}
    if len(options) < len(valued) or len(rest) - len(valued) > 1 or not set(options) <= set(_OPTIONS):
        raise ValueError(f"has options at key {number} other than {', '.join(_OPTIONS)} and {_MARK}, each once")
    rate, concurrency, prefix = (options.get(name, "") for name in _OPTIONS)
    if "rate" in options and not is_rate(rate):
        raise ValueError(f"has a rate at key {number} that is not like 60/minute")
    if "concurrency" in options and not re.fullmatch(r"[1-9]\d{0,4}", concurrency):
        raise ValueError(f"has a concurrency at key {number} that is not a number from 1")
    return ApiKey(
        named["name"] if named else _made_name(secret),
        SecretStr(secret),
        rate,
        int(concurrency or 0),
        _folder(number, prefix) if "prefix" in options else "",
        admin=_MARK in rest,
    )


def _folder(number: int, prefix: str) -> str:
    parts = prefix.removesuffix("/").split("/")
    if not all(parts) or {".", ".."} & set(parts) or not prefix.isprintable() or "\\" in prefix:
        raise ValueError(f"has a prefix at key {number} that is not a folder such as team-a/")
    return "/".join(parts) + "/"


def _made_name(secret: str) -> str:
    """The name of a key without one: the same whatever other keys there are, and slow to guess the secret from."""
    return "key-" + hashlib.pbkdf2_hmac("sha256", secret.encode(), b"name of a key", 100_000, 4).hex()
