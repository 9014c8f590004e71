"""Makes `Cache-Control` and `Content-Disposition` of stored objects, the same for every bucket."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import quote

from stable_diffusion_server.parsing import strip_marks

# Name in an object's record. Its presence means: the key is derived from the request, so the object never changes.
IMMUTABLE = "lasting"
_CACHE_IMMUTABLE = "public, max-age=31536000, immutable"
# Other objects may be overwritten; caches revalidate them by ETag.
_CACHE_ONE_MINUTE = "public, max-age=60"
_UNSAFE = re.compile(r"[^A-Za-z0-9._ -]+")
_LETTER = re.compile(r"[A-Za-z0-9]")
# File name for programs that do not read `filename*`, where nothing of the name is ASCII.
_FALLBACK = "picture"


def cache_control(record: Mapping[str, str]) -> str:
    """Return the `Cache-Control` header for an object with this record."""
    return _CACHE_IMMUTABLE if IMMUTABLE in record else _CACHE_ONE_MINUTE


def content_disposition(key: str, *, inline: bool = True) -> str:
    """Return the `Content-Disposition` header (RFC 6266) with the last part of the key as file name."""
    name = key.rpartition("/")[2]
    plain = _ascii(name)
    safe = _UNSAFE.sub("_", plain).strip(". ")
    stem, dot, extension = name.rpartition(".")
    if dot and not _LETTER.search(_ascii(stem)):
        # Nothing of 写真.webp but its extension is ASCII, and that alone would be the name without one.
        safe = f"{_FALLBACK}.{extension}" if extension.isascii() and extension.isalnum() else ""
    safe = safe or _FALLBACK
    kind = "inline" if inline else "attachment"
    exact = "" if safe == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'{kind}; filename="{safe}"{exact}'


def _ascii(name: str) -> str:
    """Return what is left of a name in ASCII; accents are dropped."""
    return unicodedata.normalize("NFKD", strip_marks(name)).encode("ascii", "ignore").decode()
