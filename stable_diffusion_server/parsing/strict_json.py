"""Parses untrusted JSON strictly and with bounded memory, and writes JSON that every parser accepts.

`json.loads` builds every value, holds the GIL while it does, and accepts more than JSON. So the bytes are scanned
first without building values: strings are skipped, values and nesting are counted, and long strings are cut out. The
text that `json.loads` then parses is short, whatever was sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from stable_diffusion_server.errors import InvalidInput, MalformedRequest, ServerError, TooLarge

# In bytes as sent: the longest string that is parsed in place, and the longest string that is not an image, which is a
# prompt of 32,000 emoji, escaped in 12 bytes each.
_MAX_INLINE_STRING, _MAX_STRING = 4096, 393_216
# Backslashes in a short image; a long one may have more.
_MAX_ESCAPES = 131_072
# Quotes in a body, including escaped ones within strings.
_MAX_QUOTES = 65_536
# Characters of a number. Parsing an integer takes time quadratic in its digits; a double has 17 digits.
_MAX_INTEGER, _MAX_NUMBER = 20, 100
_NON_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """Limits of a JSON body.

    Attributes:
        max_text_bytes: Size without images.
        max_values: Number of values.
        max_depth: Levels of nested lists and objects.
        image_fields: Top-level names below which strings may be images in base64.
        max_image_bytes: Size of each image in base64.
        max_images: Number of images.
    """

    max_text_bytes: int = 1_048_576
    max_values: int = 4096
    max_depth: int = 32
    image_fields: frozenset[str] = frozenset()
    max_image_bytes: int = 0
    max_images: int = 32


@dataclass(frozen=True, slots=True)
class _Rejected:
    """Placeholder for a value that `json` parses and this server rejects; `field` is a duplicate name."""

    reason: str
    error: type[ServerError] = InvalidInput
    field: str | None = None


@dataclass(slots=True)
class _Scan:
    """A body whose long strings are replaced by `token` and a number.

    Attributes:
        parts: The body with the replacements.
        outside: The parts of the body between strings.
        long_strings: The strings that were cut out, without quotes and with their escapes.
        size: Length of `parts` in bytes.
    """

    limits: JsonLimits
    token: str = field(default_factory=lambda: token_hex(16))
    parts: list[bytes] = field(default_factory=list)
    outside: list[bytes] = field(default_factory=list)
    long_strings: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self.limits.max_text_bytes:
            raise TooLarge(f"JSON may have {self.limits.max_text_bytes} bytes here, beside pictures in base64.")
        self.parts.append(part)


def parse_object(body: bytes, limits: JsonLimits | None = None) -> dict[str, Any]:
    """Parse a UTF-8 body that is a JSON object.

    Raises `MalformedRequest` for invalid JSON (including NaN and duplicate names), too many values or too deep
    nesting; `TooLarge` for too many bytes; `InvalidInput` for numbers out of range and lone surrogates.
    """
    limits = limits or JsonLimits()
    body = body.removeprefix(b"\xef\xbb\xbf")
    if not limits.image_fields and len(body) > limits.max_text_bytes:
        raise TooLarge(f"JSON may have {limits.max_text_bytes} bytes here.")
    scan = _scan_body(body, limits)
    _check_structure(b"".join(scan.outside), limits)
    parsed = _loads(b"".join(scan.parts))
    if isinstance(parsed, _Rejected):
        raise parsed.error(f"{parsed.field} {parsed.reason}.", field=parsed.field)
    if not isinstance(parsed, dict):
        raise MalformedRequest("The body must be a JSON object.")
    _StringRestorer(scan).restore(parsed)
    return parsed


def dumps(value: object) -> str:
    """A value as JSON that every parser accepts: lone surrogates become U+FFFD, NaN and infinity become `null`."""
    try:
        text = _dumps(value)
        text.encode()
    except ValueError:
        return _dumps(_replace_invalid(value))
    return text


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _replace_invalid(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_replace_invalid(name): _replace_invalid(part) for name, part in value.items()}
    return [_replace_invalid(part) for part in value] if isinstance(value, list | tuple) else value


def _scan_body(body: bytes, limits: JsonLimits) -> _Scan:
    """Find the strings by their quotes and cut out the long ones, in time linear in the body."""
    scan, offset, quotes = _Scan(limits), 0, 0
    while (start := body.find(b'"', offset)) >= 0:
        scan.outside.append(body[offset:start])
        scan.add(scan.outside[-1])
        end, more_quotes = _find_string_end(body, start + 1, _MAX_QUOTES - quotes)
        quotes += 1 + more_quotes
        if end - start <= _MAX_INLINE_STRING:
            scan.add(body[start : end + 1])
        else:
            scan.add(f'"{scan.token}{len(scan.long_strings)}"'.encode())
            scan.long_strings.append(body[start + 1 : end])
        offset = end + 1
    scan.outside.append(body[offset:])
    scan.add(scan.outside[-1])
    return scan


def _find_string_end(body: bytes, start: int, max_quotes: int) -> tuple[int, int]:
    """The end of the string that begins at `start`, and the number of quotes up to it, including escaped ones."""
    offset = start
    for quotes in range(1, max_quotes + 1):
        end = body.find(b'"', offset)
        if end < 0:
            raise MalformedRequest("The body is not valid JSON.")
        if end == start or body[end - 1] != ord("\\"):
            return end, quotes
        before = body[offset:end]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return end, quotes
        offset = end + 1
    raise MalformedRequest(f"The body has more than {_MAX_QUOTES} quotes.")


def _check_structure(outside: bytes, limits: JsonLimits) -> None:
    """Check number and nesting of values by the text between strings: each value follows a bracket or a comma."""
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > limits.max_values:
        raise MalformedRequest(f"The body has more than {limits.max_values} values.")
    depth = 0
    for bracket in outside.translate(None, _NON_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > limits.max_depth:
            raise MalformedRequest(f"The body has lists or objects more than {limits.max_depth} deep in one another.")


def _loads(text: bytes) -> Any:
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_build_object,
            parse_constant=lambda name: _Rejected(f"holds {name}, which is not JSON", MalformedRequest),
            parse_float=_parse_number,
            parse_int=_parse_integer,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is not valid JSON.") from error


def _build_object(pairs: list[tuple[str, Any]]) -> object:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # `add` returns None
    return _Rejected("is given more than once", MalformedRequest, _printable(duplicate)[:100])


def _parse_number(text: str) -> object:
    if len(text) > _MAX_NUMBER:
        return _Rejected(f"holds a number of more than {_MAX_NUMBER} characters")
    return value if math.isfinite(value := float(text)) else _Rejected("holds a number that is too large")


def _parse_integer(text: str) -> object:
    return int(text) if len(text) <= _MAX_INTEGER else _Rejected("holds a number that is too large")


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class _StringRestorer:
    """Puts the long strings back, and raises for rejected values, by the name of the top-level field."""

    def __init__(self, scan: _Scan) -> None:
        self._scan = scan
        self._text_bytes = scan.size
        self._images = 0

    def restore(self, parsed: dict[str, Any]) -> None:
        for name, value in parsed.items():
            parsed[name] = self._restore_value(value, _printable(name)[:100], name in self._scan.limits.image_fields)
            self._check_name(name, _printable(name)[:100])

    def _restore_value(self, value: Any, field: str, is_image: bool) -> Any:
        if isinstance(value, str):
            return self._restore_string(value, field, is_image)
        if isinstance(value, _Rejected):
            inner = f" ({value.field})" if value.field else ""
            raise value.error(f"{field}{inner} {value.reason}.", field=field)
        if isinstance(value, dict):
            for name, part in value.items():
                self._check_name(name, field)
                value[name] = self._restore_value(part, field, is_image)
        elif isinstance(value, list):
            value[:] = [self._restore_value(part, field, is_image) for part in value]
        return value

    def _check_name(self, name: str, field: str) -> None:
        if name.startswith(self._scan.token):
            raise InvalidInput("A name of the body is too long.", field="body")
        _check_text(name, field)

    def _restore_string(self, text: str, field: str, is_image: bool) -> str:
        if not text.startswith(self._scan.token):
            return _check_text(text, field)
        sent = self._scan.long_strings[int(text.removeprefix(self._scan.token))]
        if is_image:
            return self._read_image(sent, field)
        self._text_bytes += len(sent)
        if len(sent) > _MAX_STRING:
            raise InvalidInput(f"{field} is longer than {_MAX_STRING} bytes.", field=field)
        if self._text_bytes > self._scan.limits.max_text_bytes:
            raise TooLarge(f"JSON may have {self._scan.limits.max_text_bytes} bytes here, beside pictures in base64.")
        return _check_text(_decode_escapes(sent), field)

    def _read_image(self, sent: bytes, field: str) -> str:
        self._images += 1
        limits = self._scan.limits
        if self._images > limits.max_images:
            raise TooLarge(f"More than {limits.max_images} pictures are not taken.", field=field)
        if len(sent) > limits.max_image_bytes:
            raise TooLarge(
                f"{field} holds a picture of more than {limits.max_image_bytes} bytes in base64.", field=field
            )
        # Some clients escape `/`, `+` and `=`, which are rare in base64; decoding many escapes is slow.
        escapes = sent.count(b"\\")
        if not sent.isascii() or escapes > max(_MAX_ESCAPES, len(sent) // 16):
            raise InvalidInput(f"{field} is not a picture in base64.", field=field)
        return _decode_escapes(sent) if escapes else sent.decode("ascii")


def _decode_escapes(sent: bytes) -> str:
    loads: Callable[[str], str] = json.loads
    try:
        return loads(f'"{sent.decode()}"')
    except ValueError as error:
        raise MalformedRequest("The body is not valid JSON.") from error


def _check_text(text: str, field: str) -> str:
    """Return the text. Raises `InvalidInput` for a lone surrogate, which cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{field} holds a lone surrogate, which is not text.", field=field) from error
    return text
