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


def cache_control(record: Mapping[str, str]) -> str:
    """Return the `Cache-Control` header for an object with this record."""
    return _CACHE_IMMUTABLE if IMMUTABLE in record else _CACHE_ONE_MINUTE


def content_disposition(key: str, *, inline: bool = True) -> str:
    """Return the `Content-Disposition` header (RFC 6266) with the last part of the key as file name."""
    name = key.rpartition("/")[2]
    plain = unicodedata.normalize("NFKD", strip_marks(name)).encode("ascii", "ignore").decode()
    safe = _UNSAFE.sub("_", plain).strip(". ") or "picture"
    kind = "inline" if inline else "attachment"
    exact = "" if safe == name else f"; filename*=UTF-8''{quote(name, safe='')}"
    return f'{kind}; filename="{safe}"{exact}'
