"""Query and body of a request to one mapping: form, multipart with files, or JSON. Knows no parameter by name."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from stable_diffusion_server.errors import InvalidInput, Malformed, UnsupportedMedia

_FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
BODY_TYPES = ("application/json", *_FORM_TYPES)
_MAX_FIELDS = 100
# Files under a name that may come more than once.
_MAX_LISTED = 16


class JsonText(str):
    """A text of a JSON body: unlike one of a form or a query, it is never meant as a number."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a multipart form, read."""

    data: bytes = field(repr=False)


async def read_parameters(
    request: Request, files: Set[str] = frozenset(), lists: Set[str] = frozenset()
) -> dict[str, object]:
    """Query and body of a request as one mapping. A parameter given twice is refused, wherever it stands.

    `files` are the names that may be files of a multipart form; they come as `Upload`. `lists` are the names that may
    come more than once: their values come as a list, under the name without `[]`.
    """
    query = _read_pairs(request.scope["query_string"], "query")
    return _merged([*query, *(await _read_body(request, files, lists))], lists)


def read_query(query_string: bytes) -> dict[str, object]:
    """A query alone as a mapping, in the same way."""
    return _merged(_read_pairs(query_string, "query"), frozenset())


def _merged(pairs: list[tuple[str, object]], lists: Set[str]) -> dict[str, object]:
    merged: dict[str, object] = {}
    for name, value in pairs:
        if not name.isascii():
            # Every parameter's name is ASCII, and pydantic cannot tell a lone surrogate from a name.
            raise InvalidInput(f"{name[:100]} is not a parameter here.", field=name[:100])
        if name in lists:
            several = merged.setdefault(name.removesuffix("[]"), [])
            if isinstance(several, list):
                several.extend(value if isinstance(value, list) else [value])
            continue
        if name in merged:
            raise Malformed(f"{name[:100]} is given more than once.", field=name[:100])
        merged[name] = value
    return merged


def length_of(request: Request) -> int:
    """How long the body of a request says it is."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() else 0


async def _read_body(request: Request, files: Set[str], lists: Set[str]) -> list[tuple[str, object]]:
    if request.method == "GET":
        return []
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != _FORM_TYPES[1] and not await request.body():
        return []
    if media_type == "application/json":
        return _read_json(await request.body())
    if media_type == _FORM_TYPES[0]:
        return _read_pairs(await request.body(), "form")
    if media_type == _FORM_TYPES[1]:
        return await _read_multipart(request, files, lists)
    raise UnsupportedMedia(f"Send application/json or one of {', '.join(_FORM_TYPES)}.")


def _read_pairs(encoded: bytes, what: str) -> list[tuple[str, object]]:
    """A query or form, read as UTF-8 and nothing else: two names must not become one by what cannot be read."""
    try:
        return list(parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS))
    except ValueError as error:
        raise Malformed(f"The {what} is not UTF-8, or has more than {_MAX_FIELDS} fields.") from error


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object with all that is in it. Raises `Malformed`, for a name given twice at any depth too."""

    def not_a_number(name: str) -> NoReturn:
        raise Malformed(f"{name} is not JSON.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Malformed("The body has an object in which a name is given more than once.")
        return found

    try:
        parsed = json.loads(body.decode("utf-8-sig") or "{}", object_pairs_hook=unique, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise Malformed("The body is not valid JSON.") from error
    if not isinstance(parsed, dict):
        raise Malformed("The body must be a JSON object.")
    if len(parsed) > _MAX_FIELDS:
        raise Malformed(f"The body has more than {_MAX_FIELDS} fields.")
    return parsed


def _read_json(body: bytes) -> list[tuple[str, object]]:
    def not_a_number(name: str) -> NoReturn:
        raise Malformed(f"{name} is not JSON.")

    def every_pair(pairs: list[tuple[str, object]]) -> object:
        # The outermost object comes last; as pairs, so that a name given twice is seen.
        return pairs

    try:
        text = body.decode("utf-8-sig")
        parsed = json.loads(text, object_pairs_hook=every_pair, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise Malformed("The body is not valid JSON.") from error
    if not text.lstrip().startswith("{"):
        raise Malformed("The body must be a JSON object.")
    pairs: list[tuple[str, object]] = parsed
    if len(pairs) > _MAX_FIELDS:
        raise Malformed(f"The body has more than {_MAX_FIELDS} fields.")
    return [(name, JsonText(value) if isinstance(value, str) else value) for name, value in pairs]


async def _read_multipart(request: Request, files: Set[str], lists: Set[str]) -> list[tuple[str, object]]:
    items: list[tuple[str, object]] = []
    try:
        async with request.form(max_files=len(files) + 1 + _MAX_LISTED * bool(lists), max_fields=_MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name not in files:
                    raise InvalidInput(f"{name[:100]} takes no file here.", field=name[:100])
                items.append((name, Upload(await value.read()) if isinstance(value, UploadFile) else value))
    except MultiPartException as error:
        raise Malformed(f"The form could not be read ({error.message}).") from error
    return items
