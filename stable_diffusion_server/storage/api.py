"""What a bucket promises, how names become keys, and which bucket to open. Knows no pictures and no HTTP."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from pydantic import SecretStr

from stable_diffusion_server.errors import InvalidInput, ServerError, StorageUnavailable
from stable_diffusion_server.imaging import ALWAYS, EXTRA, matches_signature
from stable_diffusion_server.parsing import nfc
from stable_diffusion_server.storage.gcs.bucket import GCSBucket, GCSOptions
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.storage.s3.bucket import S3Bucket
from stable_diffusion_server.storage.s3.client import S3Options
from stable_diffusion_server.types import StoredObject

# S3's own bound on a key, in bytes of UTF-8; it holds for every bucket, so that a name is portable.
KEY_MAX_BYTES = 1024
_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)*\.[a-z]{2,}")
_EMPTY = SecretStr("")


class Bucket(Protocol):
    """A store of objects by key. Methods block, so callers keep them off the event loop.

    All raise `StorageUnavailable` when the store does not answer, and `InvalidInput` for a key it cannot hold.
    """

    def open(self) -> None:
        """Make ready for use. May be called again after it failed."""

    def close(self) -> None:
        """Let go of connections and threads."""

    def health(self) -> str | None:
        """One sentence on what keeps the store from taking pictures, as far as it is known without asking it."""

    def check_capacity(self) -> None:
        """Raises `StorageUnavailable` when a new picture could not be kept: asked before it is drawn."""

    def stat(self, key: str) -> StoredObject | None:
        """The object under `key`, or `None`; a bucket that spools says `None` as well while its store is down."""

    def peek(self, key: str) -> StoredObject | None:
        """The same for what a right depends on: never `None` for an object that could not be looked for."""

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` only if `key` is absent, atomically; returns what is stored, and whether by this call."""

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key` whether or not something was there; no reader sees half of it."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to before `end` (to the last one for `None`); fewer beyond the end. Raises `NotFound`."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with `prefix`."""

    def url(self, key: str) -> str | None:
        """The address anyone may fetch the object at; `None` when only this server can give it. Asks no one."""


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """What a bucket is opened with; each field is the setting of that name."""

    storage_provider: str = "local"
    local_bucket_dir: Path = Path("bucket")
    bucket_name: str = ""
    bucket_path: str = ""
    r2_endpoint_url: str = ""
    public_base_url: str = ""
    signed_url_seconds: int = 0
    bucket_acl: str = ""
    storage_timeout: float = 10.0
    google_application_credentials: Path | None = None
    aws_access_key_id: SecretStr = _EMPTY
    aws_secret_access_key: SecretStr = _EMPTY
    aws_session_token: SecretStr = _EMPTY

    @classmethod
    def of(cls, settings: object) -> StorageOptions:
        """The options out of something that has an attribute for each of them."""
        return cls(**{part.name: getattr(settings, part.name) for part in fields(cls)})

    def credentials(self) -> tuple[str, str, str]:
        """Key, secret and session token as they were set; empty ones leave it to boto3's own chain."""
        secrets = (self.aws_access_key_id, self.aws_secret_access_key, self.aws_session_token)
        key, secret, token = (each.get_secret_value() for each in secrets)
        return key, secret, token


def open_bucket(options: StorageOptions) -> Bucket:
    """The bucket the options ask for, not yet opened. Connects to nothing and imports no client."""
    base_url = options.public_base_url or _own_domain(options.bucket_name)
    match options.storage_provider:
        case "local":
            return LocalBucket(options.local_bucket_dir)
        case "r2" | "s3" as provider:
            return S3Bucket(
                S3Options(
                    name=options.bucket_name,
                    endpoint_url=options.r2_endpoint_url,
                    region="auto" if provider == "r2" else "",
                    base_url=base_url,
                    signed_url_seconds=options.signed_url_seconds,
                    acl=options.bucket_acl,
                    prefix=options.bucket_path,
                    timeout=options.storage_timeout,
                    credentials=options.credentials,
                )
            )
        case "gcs":
            return GCSBucket(
                GCSOptions(
                    name=options.bucket_name,
                    credentials=options.google_application_credentials,
                    base_url=base_url,
                    signed_url_seconds=options.signed_url_seconds,
                    prefix=options.bucket_path,
                    timeout=options.storage_timeout,
                )
            )
    raise ValueError(f"no bucket provider {options.storage_provider!r}")


def check_if_blob_exists(bucket: Bucket, key: str) -> bool:
    """Whether an object of that key is stored. The name is the one users know from the original server."""
    return bucket.stat(key) is not None


def read_picture(bucket: Bucket, key: str) -> bytes:
    """The whole object under `key`, of which the first bytes are a picture's.

    Raises `NotFound`, and `StorageUnavailable` for what is no picture or could not be read.
    """
    data = bucket.read(key)
    if not matches_signature(data, (*ALWAYS, *EXTRA)):
        raise StorageUnavailable("What the storage gives under this name is no picture.", retry_after=30)
    return data


def check_bucket(bucket: Bucket, key: str, get: Callable[[str], bytes]) -> Iterator[tuple[str, str | None]]:
    """Try everything the server does with a bucket: pairs of what was tried and what is wrong with it, or `None`.

    `key` is to be one that no one uses, and is removed in the end; `get` fetches an address.
    """
    data, record = b"check-storage", {"made": "by check-storage"}

    def kept(condition: bool, otherwise: str) -> None:
        if not condition:
            raise StorageUnavailable(otherwise)

    def fetch() -> None:
        url = bucket.url(key)
        kept(url is None or get(url) == data, f"{(url or '').partition('?')[0]} gives something else.")

    def remove() -> None:
        bucket.delete(key)
        kept(bucket.stat(key) is None, "It is still there.")

    def put(expected: bool, otherwise: str) -> None:
        kept(bucket.create(key, data, "text/plain", record)[1] is expected, otherwise)

    def look() -> None:
        stored = bucket.stat(key)
        kept(stored is not None and dict(stored.record) == record, "It is not there with its record.")

    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("open", bucket.open),
        ("put", lambda: put(True, "Something is there already.")),
        ("stat", look),
        ("conditional put", lambda: put(False, "The second put of a name was not refused.")),
        ("read", lambda: kept(bucket.read(key, 6) == data[6:], "Other bytes came back.")),
        ("address", fetch),
        ("delete", remove),
    )
    for name, step in steps:
        try:
            step()
        except ServerError as error:
            yield name, error.detail
        else:
            yield name, None


def object_key(bucket_path: str, name: str) -> str:
    """The key of `name` under `bucket_path`: segments kept as they are, Unicode in NFC, nothing encoded.

    Raises `InvalidInput` naming `save_path` for a name that is empty, absolute, climbs (`..`), holds control
    characters or a backslash, or makes a key longer than `KEY_MAX_BYTES`.
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
    """The key as the path of a URL: percent-encoded once, '/' kept."""
    return quote(key, safe="/")


def _own_domain(bucket_name: str) -> str:
    """The base URL of a bucket named after its own domain, as in `static.example.com`; empty for any other name."""
    return f"https://{bucket_name}" if _DOMAIN.fullmatch(bucket_name) else ""


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"save_path {why}.", field="save_path")
