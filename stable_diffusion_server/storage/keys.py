"""Makes object keys from names, checks their limits, and makes URL paths from keys."""

from __future__ import annotations

import unicodedata
from urllib.parse import quote

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.parsing import nfc

# S3's limit in bytes of UTF-8, applied to every bucket so that keys are portable.
KEY_MAX_BYTES = 1024


def object_key(bucket_path: str, name: str) -> str:
    """Return the key of `name` under `bucket_path`, in Unicode NFC, not percent-encoded.

    Raises `InvalidInput` for `save_path` if the name is empty or absolute, has a part `.` or `..`, control characters
    or a backslash, or if the key is longer than `KEY_MAX_BYTES`.
    """
    if len(name) > KEY_MAX_BYTES:
        raise _refused(f"makes a key longer than {KEY_MAX_BYTES} bytes")
    try:
        name = nfc(name)
    except ValueError as error:
        raise _refused(str(error)) from error
    if not name:
        raise _refused("is empty; leave it out to have a name made")
    if name.startswith("/"):
        raise _refused("starts with '/'; names are relative")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise _refused("holds control characters or broken text")
    if "\\" in name:
        raise _refused("holds a backslash; folders are separated by '/'")
    segments = name.split("/")
    if any(not segment.strip() for segment in segments):
        raise _refused("has an empty part between two '/' or at its end")
    if any(segment in (".", "..") for segment in segments):
        raise _refused("has a part '.' or '..'")
    prefix = bucket_path.strip("/")
    key = f"{prefix}/{name}" if prefix else name
    if len(key.encode()) > KEY_MAX_BYTES:
        raise _refused(f"makes a key longer than {KEY_MAX_BYTES} bytes")
    return key


def url_path(key: str) -> str:
    """Return the key as URL path: percent-encoded, except for `/`."""
    return quote(key, safe="/")


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"save_path {why}.", field="save_path")
