"""Which kinds of picture files are taken: their names, in words, and how they begin. Pure; decodes nothing."""

from __future__ import annotations

from collections.abc import Sequence

# By the names Pillow has for them: taken always, and taken if EXTRA_IMAGE_FORMATS names them.
DEFAULT_FORMATS = ("PNG", "JPEG", "WEBP")
OPTIONAL_FORMATS = ("AVIF", "GIF")
# So many bytes tell a kind.
SIGNATURE_BYTES = 12

_WORDS = {"WEBP": "WebP"}
_BEGINNINGS = {
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "WEBP": ((0, b"RIFF"), (8, b"WEBP")),
    "GIF": ((0, b"GIF8"),),
    "AVIF": ((4, b"ftyp"), (8, b"avi")),
}


def describe_formats(formats: Sequence[str]) -> str:
    """As in "PNG, JPEG or WebP"."""
    *others, last = (_WORDS.get(name, name) for name in formats)
    return f"{', '.join(others)} or {last}" if others else last


def media_types(formats: Sequence[str]) -> str:
    """As an Accept header has them."""
    return ", ".join(f"image/{name.lower()}" for name in formats)


def matches_signature(data: bytes | bytearray, formats: Sequence[str]) -> bool:
    """Whether a file begins as one of these kinds does."""
    return any(all(data.startswith(mark, at) for at, mark in _BEGINNINGS[name]) for name in formats)
