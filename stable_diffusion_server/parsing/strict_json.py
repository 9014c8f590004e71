"""JSON of others is measured before anything is built of it, and read strictly; JSON of ours can always be written.

`json.loads` builds every object of a text, holds the interpreter while it does, and takes what is no JSON. So the bytes
are scanned first, without building anything: their strings are skipped, what is between them is counted, and long
strings are cut out, so that what `json.loads` is given is short whatever was sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from stable_diffusion_server.errors import InvalidInput, MalformedRequest, ServerError, TooLarge

# Longest string that is read in its place, longest text that is no picture, both in bytes as sent.
_SHORT, _LONGEST_TEXT = 4096, 131_072
# Quotes in a body, those within strings included.
_MOST_QUOTES = 65_536
# Characters of a number; doubles have 17 digits, and what is longer takes long to read.
_LONGEST_WHOLE, _LONGEST_NUMBER = 20, 100
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """How much JSON is taken: `text_bytes` beside pictures, `nodes` values, `depth` lists and objects in another.

    Below the top-level names `pictures` there may be strings of `picture_bytes` each, `most_pictures` of them.
    """

    max_text_bytes: int = 1_048_576
    max_values: int = 4096
    max_depth: int = 32
    image_fields: frozenset[str] = frozenset()
    max_image_bytes: int = 0
    max_images: int = 32


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A value that Python's json would take and this server does not; `field` where the value has no name itself."""

    why: str
    error: type[ServerError] = InvalidInput
    field: str | None = None


@dataclass(slots=True)
class _Scan:
    """A body with its long strings cut out of it: `token` and a number stand in their places."""

    limits: JsonLimits
    token: str = field(default_factory=lambda: token_hex(16))
    kept: list[bytes] = field(default_factory=list)
    outside: list[bytes] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    size: int = 0

    def keep(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self.limits.max_text_bytes:
            raise TooLarge(f"JSON may have {self.limits.max_text_bytes} bytes here, beside pictures in base64.")
        self.kept.append(part)


def parse_object(body: bytes, limits: JsonLimits | None = None) -> dict[str, Any]:
    """The JSON object in a body, in UTF-8.

    Raises `MalformedRequest` for what is no JSON (NaN and names given twice included), too many values, or too deep;
    `TooLarge` for too many bytes; `InvalidInput` for values that cannot be kept: numbers that overflow, surrogates.
    """
    limits = limits or JsonLimits()
    body = body.removeprefix(b"\xef\xbb\xbf")
    if not limits.image_fields and len(body) > limits.max_text_bytes:
        raise TooLarge(f"JSON may have {limits.max_text_bytes} bytes here.")
    scan = _scanned(body, limits)
    _measure(b"".join(scan.outside), limits)
    parsed = _loads(b"".join(scan.kept))
    if isinstance(parsed, _Unreadable):
        raise parsed.error(f"{parsed.field} {parsed.why}.", field=parsed.field)
    if not isinstance(parsed, dict):
        raise MalformedRequest("The body must be a JSON object.")
    _Filling(scan).fill(parsed)
    return parsed


def dumps(value: object) -> str:
    """A value as JSON that every reader takes: lone surrogates become U+FFFD, numbers that are not finite `null`."""
    try:
        text = _dumps(value)
        text.encode()
    except ValueError:
        return _dumps(_tamed(value))
    return text


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _tamed(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_tamed(name): _tamed(part) for name, part in value.items()}
    return [_tamed(part) for part in value] if isinstance(value, list | tuple) else value


def _scanned(body: bytes, limits: JsonLimits) -> _Scan:
    """Skip the strings, each found by its quotes, and cut out the long ones. Takes time in proportion to the body."""
    scan, at, quotes = _Scan(limits), 0, 0
    while (start := body.find(b'"', at)) >= 0:
        scan.outside.append(body[at:start])
        scan.keep(scan.outside[-1])
        end, further = _end_of_string(body, start + 1, _MOST_QUOTES - quotes)
        quotes += 1 + further
        if end - start <= _SHORT:
            scan.keep(body[start : end + 1])
        else:
            scan.keep(f'"{scan.token}{len(scan.cut)}"'.encode())
            scan.cut.append(body[start + 1 : end])
        at = end + 1
    scan.outside.append(body[at:])
    scan.keep(scan.outside[-1])
    return scan


def _end_of_string(body: bytes, start: int, most: int) -> tuple[int, int]:
    """Where the string ends that begins at `start`, and how many quotes that took, escaped ones included."""
    at = start
    for quotes in range(1, most + 1):
        end = body.find(b'"', at)
        if end < 0:
            raise MalformedRequest("The body is not valid JSON.")
        if end == start or body[end - 1] != ord("\\"):
            return end, quotes
        before = body[at:end]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return end, quotes
        at = end + 1
    raise MalformedRequest(f"The body has more than {_MOST_QUOTES} quotes.")


def _measure(outside: bytes, limits: JsonLimits) -> None:
    """Count what stands between the strings: each value follows a bracket or a comma."""
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > limits.max_values:
        raise MalformedRequest(f"The body has more than {limits.max_values} values.")
    depth = 0
    for bracket in outside.translate(None, _ALL_BUT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > limits.max_depth:
            raise MalformedRequest(f"The body has lists or objects more than {limits.max_depth} deep in one another.")


def _loads(text: bytes) -> Any:
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_constant=lambda name: _Unreadable(f"holds {name}, which is not JSON", MalformedRequest),
            parse_float=_number,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is not valid JSON.") from error


def _object(pairs: list[tuple[str, Any]]) -> object:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # `add` gives None, which goes on
    return _Unreadable("is given more than once", MalformedRequest, _printable(twice)[:100])


def _number(text: str) -> object:
    if len(text) > _LONGEST_NUMBER:
        return _Unreadable(f"holds a number of more than {_LONGEST_NUMBER} characters")
    return value if math.isfinite(value := float(text)) else _Unreadable("holds a number that is too large")


def _whole(text: str) -> object:
    return int(text) if len(text) <= _LONGEST_WHOLE else _Unreadable("holds a number that is too large")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class _Filling:
    """Puts back what was cut out, and refuses what cannot be read, by the top-level name it stands under."""

    def __init__(self, scan: _Scan) -> None:
        self._scan = scan
        self._text_bytes = scan.size
        self._pictures = 0

    def fill(self, parsed: dict[str, Any]) -> None:
        for name, value in parsed.items():
            parsed[name] = self._filled(value, _printable(name)[:100], name in self._scan.limits.image_fields)
            self._check_name(name, _printable(name)[:100])

    def _filled(self, value: Any, field: str, pictures: bool) -> Any:
        if isinstance(value, str):
            return self._text(value, field, pictures)
        if isinstance(value, _Unreadable):
            inner = f" ({value.field})" if value.field else ""
            raise value.error(f"{field}{inner} {value.why}.", field=field)
        if isinstance(value, dict):
            for name, part in value.items():
                self._check_name(name, field)
                value[name] = self._filled(part, field, pictures)
        elif isinstance(value, list):
            value[:] = [self._filled(part, field, pictures) for part in value]
        return value

    def _check_name(self, name: str, field: str) -> None:
        if name.startswith(self._scan.token):
            raise InvalidInput("A name of the body is too long.", field="body")
        _check_text(name, field)

    def _text(self, text: str, field: str, pictures: bool) -> str:
        if not text.startswith(self._scan.token):
            return _check_text(text, field)
        sent = self._scan.cut[int(text.removeprefix(self._scan.token))]
        if pictures:
            return self._picture(sent, field)
        self._text_bytes += len(sent)
        if len(sent) > _LONGEST_TEXT:
            raise InvalidInput(f"{field} is longer than {_LONGEST_TEXT} bytes.", field=field)
        if self._text_bytes > self._scan.limits.max_text_bytes:
            raise TooLarge(f"JSON may have {self._scan.limits.max_text_bytes} bytes here, beside pictures in base64.")
        return _check_text(_unescaped(sent), field)

    def _picture(self, sent: bytes, field: str) -> str:
        self._pictures += 1
        limits = self._scan.limits
        if self._pictures > limits.max_images:
            raise TooLarge(f"More than {limits.max_images} pictures are not taken.", field=field)
        if len(sent) > limits.max_image_bytes:
            raise TooLarge(
                f"{field} holds a picture of more than {limits.max_image_bytes} bytes in base64.", field=field
            )
        # Some writers escape `/`, `+` and `=`, which are few in a compressed file; reading escapes takes its time.
        escapes = sent.count(b"\\")
        if not sent.isascii() or escapes > max(_LONGEST_TEXT, len(sent) // 16):
            raise InvalidInput(f"{field} is not a picture in base64.", field=field)
        return _unescaped(sent) if escapes else sent.decode("ascii")


def _unescaped(sent: bytes) -> str:
    read: Callable[[str], str] = json.loads
    try:
        return read(f'"{sent.decode()}"')
    except ValueError as error:
        raise MalformedRequest("The body is not valid JSON.") from error


def _check_text(text: str, field: str) -> str:
    """The text. Raises `InvalidInput` for a lone surrogate, which no file, address or answer can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{field} holds a lone surrogate, which is not text.", field=field) from error
    return text
