"""What a bucket promises, how names become keys, and which bucket to open. Knows no pictures and no HTTP."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from stable_diffusion_server.buckets.local import LocalBucket
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.orders import Stored

# S3's own bound on a key, in bytes of UTF-8; it holds for every bucket, so that a name is portable.
KEY_MAX_BYTES = 1024


class Bucket(Protocol):
    """A store of objects by key. Methods block, so callers keep them off the event loop.

    All raise `StorageUnavailable` when the store does not answer, and `InvalidInput` for a key it cannot hold.
    """

    def open(self) -> None:
        """Make ready for use; called once, when the server starts."""

    def stat(self, key: str) -> Stored | None:
        """The object under `key`, or `None`."""

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[Stored, bool]:
        """Store `data` only if `key` is absent, atomically; returns what is stored, and whether by this call."""

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        """Store `data` under `key` whether or not something was there; no reader sees half of it."""

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises `NotFound`."""


def open_bucket(provider: str, local_dir: Path) -> Bucket:
    """The bucket the settings ask for, not yet opened."""
    if provider != "local":
        raise ValueError(f"no bucket provider {provider!r}")
    return LocalBucket(local_dir)


def check_if_blob_exists(bucket: Bucket, key: str) -> bool:
    """Whether an object of that key is stored. The name is the one users know from the original server."""
    return bucket.stat(key) is not None


def object_key(bucket_path: str, name: str) -> str:
    """The key of `name` under `bucket_path`: segments kept as they are, Unicode in NFC, nothing encoded.

    Raises `InvalidInput` naming `save_path` for a name that is empty, absolute, climbs (`..`), holds control
    characters or a backslash, or makes a key longer than `KEY_MAX_BYTES`.
    """
    if len(name) > KEY_MAX_BYTES:
        # Before anything else: normalizing takes time that grows with the square of a text of combining marks.
        raise _refused(f"makes a key longer than {KEY_MAX_BYTES} bytes")
    name = unicodedata.normalize("NFC", name)
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
    """The key as the path of a URL: percent-encoded once, '/' kept."""
    return quote(key, safe="/")


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"save_path {why}.", field="save_path")
