"""Reads the parameter `extra`: an object in JSON, its JSON text in a form or a query."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from pydantic_core import PydanticCustomError

from stable_diffusion_server.errors import ServerError
from stable_diffusion_server.parsing import JsonLimits, parse_object

# Members, characters of a text in one of them, and characters of the JSON text.
_MAX_MEMBERS, _MAX_TEXT, _MAX_JSON = 32, 2000, 20_000
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_WHOLE_MAX = 2**53


def read_extra(value: object) -> object:
    """Return the object of `extra`, `None` for an empty one. Raises `PydanticCustomError` with what is wrong."""
    if isinstance(value, str):
        value = _parsed(value)
    if value is None or not isinstance(value, Mapping):
        return value
    if len(value) > _MAX_MEMBERS:
        raise PydanticCustomError("extra_many", "it has more than 32 members")
    for name, member in value.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PydanticCustomError("extra_name", "a name has small letters, digits and underscores, 64 at most")
        if not _is_plain(member):
            raise PydanticCustomError("extra_value", "a value is true, false, a number, or a text of 2000 characters")
    return {name: str(member) if isinstance(member, str) else member for name, member in value.items()} or None


def _is_plain(member: object) -> bool:
    if isinstance(member, str):
        return len(member) <= _MAX_TEXT
    if isinstance(member, float):
        return math.isfinite(member)
    return isinstance(member, int) and abs(member) <= _WHOLE_MAX


def _parsed(text: str) -> object:
    if len(text) > _MAX_JSON:
        raise PydanticCustomError("extra_long", "it is longer than 20,000 characters")
    if not text.strip():
        return None
    try:
        return parse_object(text.encode(), JsonLimits(_MAX_JSON))
    except (ServerError, ValueError):
        raise PydanticCustomError("extra_json", "the text is no JSON object") from None
