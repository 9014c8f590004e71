"""Reads headers of answers to downloads: size, range, validator, and a file name that is safe to use."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

import httpx

# Bytes of a name; with the hidden partial file's additions it stays below the 255 that file systems take.
MAX_NAME_BYTES = 200
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
_EXTENDED = re.compile(r"filename\*\s*=\s*(?:utf-8|iso-8859-1)?'[^']*'([^;\s]+)", re.IGNORECASE)
_QUOTED = re.compile(r'filename\s*=\s*"((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_PLAIN = re.compile(r"filename\s*=\s*([^;\s]+)", re.IGNORECASE)
# What some file systems refuse.
_REFUSED = re.compile(r'[<>:"|?*]')
_DIGITS = re.compile(r"\d{1,18}")
_ESCAPED = re.compile(r"\\(.)")


def start_and_size(response: httpx.Response) -> tuple[int, int | None]:
    """Where the body begins in the file, and the bytes of the whole file; `None` if the answer does not say.

    An answer to a range with a `Content-Range` that makes no sense begins at -1.
    """
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        match = _RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if match is None:
            return -1, None
        return int(match[1]), None if match[3] == "*" else int(match[3])
    declared = response.headers.get("content-length", "")
    return 0, int(declared) if _DIGITS.fullmatch(declared) else None


def validator_of(response: httpx.Response) -> str:
    """What `If-Range` takes (RFC 9110): a strong ETag, else the time of the last change; empty without either."""
    etag = str(response.headers.get("etag", "")).strip()
    if etag.startswith('"') and etag.endswith('"') and 2 < len(etag) <= 400 and etag.isascii() and etag.isprintable():
        return etag
    modified = str(response.headers.get("last-modified", "")).strip()
    return modified if 0 < len(modified) <= 40 and modified.isascii() and modified.isprintable() else ""


def offered_name(response: httpx.Response) -> str:
    """The file name in `Content-Disposition`, as it came; empty without one."""
    header = response.headers.get("content-disposition", "")[:4000]
    if match := _EXTENDED.search(header):
        return unquote(match[1])
    if match := _QUOTED.search(header):
        return _ESCAPED.sub(r"\1", match[1])
    match = _PLAIN.search(header)
    return match[1] if match else ""


def safe_name(name: str) -> str:
    """A file name without folders, control characters, leading dots and what file systems refuse; may be empty."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(char for char in unicodedata.normalize("NFC", last) if char.isprintable())
    kept = _REFUSED.sub("_", kept).lstrip(". ").rstrip(" .")
    stem, dot, ending = kept.rpartition(".")
    room = MAX_NAME_BYTES - len((dot + ending).encode())
    if len(kept.encode()) <= MAX_NAME_BYTES or room <= 0:
        return kept if room > 0 else ""
    return stem.encode()[:room].decode(errors="ignore").rstrip(" .") + dot + ending


def last_name(*paths: str) -> str:
    """The safe last part of the first of these paths that ends with one that has an ending, else of the first."""
    names = [safe_name(unquote(path.partition("?")[0])) for path in paths]
    return next((name for name in names if "." in name), names[0])


def advice_for(status: int) -> str:
    """What to do about a status, as the end of a sentence; empty if nothing is known."""
    if status in (401, 403):
        return "; it needs a login: a token in the address, or another address"
    return "; there is no such file" if status in (404, 410) else ""
