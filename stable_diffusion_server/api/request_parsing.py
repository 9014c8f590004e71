"""Reads query and body of a request (form, multipart or JSON) into one mapping, and rejects repeated parameters."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from stable_diffusion_server.api.concurrency import run_if_large
from stable_diffusion_server.errors import InvalidInput, MalformedRequest, TooLarge, UnsupportedMedia
from stable_diffusion_server.parsing import JsonLimits, parse_object

_FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")
BODY_TYPES = ("application/json", *_FORM_TYPES)
# JSON comes with these media types too if a client sets none: `curl --data` says it is a form, `fetch` plain text. A
# page of another origin could send these without a preflight request, but the access policy refuses its origin.
JSON_TYPES = ("application/json", "", "text/plain", _FORM_TYPES[0])
_BOM = b"\xef\xbb\xbf"
# Bytes of a body in which its first character is looked for.
_HEAD_BYTES = 64
_MAX_FIELDS = 100
# Maximum percent signs in a form, enough for 32,000 emoji. A malformed escape costs as much as 1,000 letters.
_MAX_ESCAPES = 131_072
# Maximum files of a repeatable parameter.
_MAX_LISTED = 16
_INDEX_DIGITS = 4
# Other codecs of Python take quadratic time, raise errors of their own, or produce lone surrogates.
_CHARSETS = frozenset((b"utf-8", b"utf8", b"us-ascii", b"ascii"))
_LONGEST_MEDIA_TYPE = 500


class RawJson(str):
    """A text in a JSON body. Unlike a text in a form or query, it is never converted to a number."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Maximum bytes of all texts of a body together, and of one image file."""

    text_bytes: int = 1_048_576
    picture_bytes: int = 20_971_520

    def for_json(self, pictures: Set[str]) -> JsonLimits:
        """Return the limits of a JSON body whose members of these names hold images in base64 or data URLs."""
        return JsonLimits(
            self.text_bytes, image_fields=frozenset(pictures), max_image_bytes=self.picture_bytes * 4 // 3 + 1024
        )


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """The content of a file in a multipart form."""

    data: bytes = field(repr=False)


async def read_parameters(
    request: Request,
    files: Set[str] = frozenset(),
    lists: Set[str] = frozenset(),
    pictures: Set[str] = frozenset(),
    ignored: Set[str] = frozenset(),
) -> dict[str, object]:
    """Return query and body of a request as one mapping. Raises `MalformedRequest` for a repeated parameter.

    `files` are the parameters that may be files of a multipart form; the result has them as `UploadedFile`. `lists` are
    the parameters that may repeat, also as `name[]` and `name[0]`; the result has a list. `pictures` are the parameters
    that may hold an image in base64 in JSON, `ignored` those of a query that mean nothing here.
    """
    query = [pair for pair in _read_pairs(request.scope["query_string"], "query") if pair[0] not in ignored]
    return _merged([*query, *(await _read_body(request, files, lists, pictures))], lists)


def read_query(query_string: bytes, lists: Set[str] = frozenset()) -> dict[str, object]:
    """Return a query string as a mapping, with the rules of `read_parameters`."""
    return _merged(_read_pairs(query_string, "query"), lists)


def _merged(pairs: list[tuple[str, object]], lists: Set[str]) -> dict[str, object]:
    merged: dict[str, object] = {}
    for name, value in _in_order(pairs, lists):
        if not name.isascii():
            # Pydantic fails on lone surrogates in names.
            raise InvalidInput(f"{name[:100]} is not a parameter here.", field=name[:100])
        if (listed := _list_name(name, lists)) is not None:
            several = merged.setdefault(listed, [])
            if isinstance(several, list) and value is not None:
                several.extend(value if isinstance(value, list) else [value])
            continue
        if name in merged:
            raise MalformedRequest(f"{name[:100]} is given more than once.", field=name[:100])
        merged[name] = value
    return merged


def _list_name(name: str, lists: Set[str]) -> str | None:
    """Return the parameter in `lists` that a name means: `image`, `image[]` or `image[0]`; `None` for other names."""
    if name in lists:
        return name
    base, bracket, index = name[:-1].partition("[")
    is_index = not index or (len(index) <= _INDEX_DIGITS and index.isascii() and index.isdigit())
    return base if bracket and name.endswith("]") and base in lists and is_index else None


def _in_order(pairs: list[tuple[str, object]], lists: Set[str]) -> list[tuple[str, object]]:
    """Return the pairs with those of a list by their index, if they have one: PHP sends `image[1]` in any place."""

    def index_of(pair: tuple[str, object]) -> int:
        index = pair[0][:-1].partition("[")[2]
        return int(index) if index and _list_name(pair[0], lists) is not None else 0

    return sorted(pairs, key=index_of) if lists else pairs


def limits_of(request: Request) -> BodyLimits:
    """Return the limits that the access middleware set for this request."""
    limits = request.scope.get("state", {}).get("body_limits")
    return limits if isinstance(limits, BodyLimits) else BodyLimits()


async def read_json(request: Request, pictures: Set[str] = frozenset()) -> dict[str, Any]:
    """Return a JSON body, `{}` if it is empty.

    Raises `MalformedRequest`, `InvalidInput`, `TooLarge` and `UnsupportedMedia`.
    """
    body = await request.body()
    if not body:
        return {}
    if not _is_json(_media_type_of(request), body):
        raise UnsupportedMedia("Send application/json.")
    parsed = await run_if_large(len(body), parse_object, body, limits_of(request).for_json(pictures))
    if len(parsed) > _MAX_FIELDS:
        raise MalformedRequest(f"The body has more than {_MAX_FIELDS} fields.")
    return parsed


def _is_json(media_type: str, body: bytes) -> bool:
    """Return whether a body is JSON: by its media type, or by its first character if the client chose no type."""
    if media_type == "application/json":
        return True
    return media_type in JSON_TYPES and body[:_HEAD_BYTES].removeprefix(_BOM).lstrip().startswith(b"{")


def _media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_body(
    request: Request, files: Set[str], lists: Set[str], pictures: Set[str]
) -> list[tuple[str, object]]:
    if request.method == "GET":
        return []
    media_type = _media_type_of(request)
    if media_type != _FORM_TYPES[1] and not await request.body():
        return []
    if media_type in JSON_TYPES and _is_json(media_type, await request.body()):
        parsed = await read_json(request, pictures)
        return [(name, RawJson(value) if isinstance(value, str) else value) for name, value in parsed.items()]
    if media_type == _FORM_TYPES[0]:
        body = await request.body()
        if len(body) > (most := limits_of(request).text_bytes):
            raise TooLarge(f"A form of this type may have {most} bytes; longer ones come as multipart/form-data.")
        if body.count(b"%") > _MAX_ESCAPES:
            raise TooLarge(f"A form of this type may have {_MAX_ESCAPES} percent signs; send multipart/form-data.")
        return await run_if_large(len(body), _read_pairs, body, "form")
    if media_type == _FORM_TYPES[1]:
        return await _read_multipart(request, files, lists)
    raise UnsupportedMedia(f"Send application/json or one of {', '.join(_FORM_TYPES)}.")


def _read_pairs(encoded: bytes, what: str) -> list[tuple[str, object]]:
    """Parse a query or form as strict UTF-8: replacement characters could make two names equal."""
    try:
        return list(parse_qsl(encoded.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS))
    except ValueError as error:
        raise MalformedRequest(f"The {what} is not UTF-8, or has more than {_MAX_FIELDS} fields.") from error


async def _read_multipart(request: Request, files: Set[str], lists: Set[str]) -> list[tuple[str, object]]:
    _check_charset(request.headers.get("content-type", ""))
    items: list[tuple[str, object]] = []
    left = limits_of(request).text_bytes
    most = len(files) + 1 + _MAX_LISTED * bool(files & lists)
    try:
        async with request.form(max_files=most, max_fields=_MAX_FIELDS, max_part_size=left) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and (_list_name(name, lists) or name) not in files:
                    raise InvalidInput(f"{name[:100]} takes no file here.", field=name[:100])
                left -= len(name) + (len(value) if isinstance(value, str) else 0)
                if left < 0:
                    raise TooLarge(f"The texts of a form may have {limits_of(request).text_bytes} characters.")
                items.append((name, UploadedFile(await value.read()) if isinstance(value, UploadFile) else value))
    except MultiPartException as error:
        raise MalformedRequest(f"The form could not be read ({error.message}).") from error
    return items


def _check_charset(media_type: str) -> None:
    """Raise `UnsupportedMedia` for a form whose encoding is not UTF-8."""
    if len(media_type) > _LONGEST_MEDIA_TYPE:
        raise UnsupportedMedia(f"A media type may have {_LONGEST_MEDIA_TYPE} characters.")
    _, options = parse_options_header(media_type)
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise UnsupportedMedia("Forms are read as UTF-8.")
