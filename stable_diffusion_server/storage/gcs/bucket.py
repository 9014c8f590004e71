"""Google Cloud Storage bucket."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from stable_diffusion_server.errors import (
    KeyBusy,
    NotFound,
    StorageRefused,
    StorageUnavailable,
)
from stable_diffusion_server.imaging import is_complete_file, is_image_object
from stable_diffusion_server.storage.base import Bucket, classify_refusal, is_store_available
from stable_diffusion_server.storage.gcs.errors import (
    FORBIDDEN,
    ConditionFailed,
    Refused,
    malformed_response,
    translate_gcs_errors,
)
from stable_diffusion_server.storage.object_headers import cache_control, content_disposition
from stable_diffusion_server.types import StoredObject

# Object written at each start to test write access, and later to tell whether the store rejects one key or every
# request.
PROBE = ".stable-diffusion-server"
# Metadata beside the record: a random id of the writing call, and the MD5 of the bytes (base64).
_WRITER, _MD5 = "writer", "md5"
_SIGNATURE_BYTES = 12
_MAX_CREATE_ATTEMPTS = 5
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


@dataclass(frozen=True, slots=True)
class GCSOptions:
    """Name, address and access of a bucket. `timeout` in seconds; `credentials=None` selects Google's default chain.

    `signing_url` is the endpoint in signed URLs, if it is not Google's.
    """

    name: str
    credentials: Path | None = None
    base_url: str = ""
    signed_url_seconds: int = 0
    signing_url: str = ""
    prefix: str = ""
    timeout: float = 10.0


class GCSBucket(Bucket):
    """Objects of a GCS bucket. Thread-safe; methods block on the network.

    Responses are verified: a write by Google's checksum, an object by that or by its first and last bytes.
    """

    def __init__(self, options: GCSOptions) -> None:
        self._options = options
        self._probe = f"{options.prefix.strip('/')}/{PROBE}".lstrip("/")
        self._bucket: Any = None

    def open(self) -> None:
        """Create the client and write the probe. May be called again after a failure.

        Raises `StorageUnavailable`: missing or wrong credentials, no such bucket, access denied, no response.
        """
        with self._translated_errors("write to it", bucket_asked=True):
            self._bucket = self._bucket or _client(self._options).bucket(self._options.name)
            # A failed condition means an earlier start wrote the probe, which proves write access too.
            with suppress(ConditionFailed):
                self._write_probe(if_generation_match=0)
        self.url(self._probe)  # raises now if the credentials cannot sign, not after the first image

    def close(self) -> None:
        """Close the connections."""
        if self._bucket is not None:
            self._bucket.client.close()

    def stat(self, key: str) -> StoredObject | None:
        """Return the object under `key`; `None` if it is absent, empty, truncated or garbage."""
        with self._translated_errors("look into it"):
            blob = self._find_blob(key)
            return self._verified(blob) if blob is not None else None
        return None

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent; of concurrent writers the first wins and the others get its object."""
        writer, generation = uuid4().hex, 0
        for _ in range(_MAX_CREATE_ATTEMPTS):
            try:
                metadata = {**record, _WRITER: writer}
                return self._upload_for_caller(key, data, content_type, metadata, if_generation_match=generation), True
            except ConditionFailed:
                there = self._find_blob(key)
            with self._translated_errors("look into it"):
                if there is None:
                    generation = 0  # removed meanwhile
                elif (stored := self._verified(there)) is not None or not data:
                    # After a lost response the client repeats the write: then the earlier writer is this call.
                    return stored or _to_stored_object(there), _writer_of(there) == writer
                else:
                    generation = there.generation  # replace an empty, truncated or garbage object
        raise KeyBusy("The storage is busy with other writers of this name.", retry_after=5)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`; readers get the old object or the new one."""
        return self._upload_for_caller(key, data, content_type, {**record, _WRITER: uuid4().hex})

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive). Raises `NotFound`."""
        if end is not None and end <= start:
            return b""
        try:
            with self._translated_errors("read from it", beyond=True):
                # Google's range end is inclusive.
                last = None if end is None else end - 1
                blob = self._open_bucket().blob(key)
                data = bytes(blob.download_as_bytes(start=start or None, end=last, **self._request_options))
                if not data and not start:
                    raise malformed_response("an object without bytes")
                return data
        except Refused as refused:
            raise classify_refusal(refused.detail, refused.code, self._head_probe) from refused
        return b""

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        try:
            with self._translated_errors("delete from it"):
                self._open_bucket().blob(key).delete(**self._request_options)
        except NotFound:
            pass
        except Refused as refused:  # credentials may write but not delete: not an outage
            raise StorageRefused(refused.detail) from refused

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with `prefix`, sorted."""
        with self._translated_errors("list it", bucket_asked=True):
            for blob in self._open_bucket().list_blobs(prefix=prefix, **self._request_options):
                if blob.size and blob.name != self._probe:
                    yield blob.name

    def url(self, key: str) -> str | None:
        """Return a signed URL if `signed_url_seconds` is set, otherwise the URL below the base URL.

        Returns `None` without both, because the public address is unknown.
        """
        seconds, base = self._options.signed_url_seconds, self._options.base_url
        if not seconds:
            return f"{base}/{quote(key, safe='/')}" if base else None
        blob = self._open_bucket().blob(key)
        named = {"version": "v4", "method": "GET", "expiration": timedelta(seconds=seconds)}
        at = {"api_access_endpoint": self._options.signing_url} if self._options.signing_url else {}
        try:
            return str(blob.generate_signed_url(**named, **at))
        except (AttributeError, TypeError) as error:
            raise StorageUnavailable(
                "These credentials cannot sign addresses: they hold no private key (GOOGLE_APPLICATION_CREDENTIALS)."
            ) from error

    @property
    def _request_options(self) -> dict[str, Any]:
        """Timeouts (connect, read) in seconds, and Google's default retry rule with our limits."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        timeout = self._options.timeout
        retry = DEFAULT_RETRY.with_timeout(3 * timeout).with_delay(initial=0.2, maximum=2.0)
        return {"timeout": (min(5.0, timeout), timeout), "retry": retry}

    def _find_blob(self, key: str) -> Any:
        """Return the blob's metadata, or `None` if it is absent.

        Raises `InvalidInput` if only this key is rejected.
        """
        try:
            return self._get_blob(key)
        except Refused as refused:
            error = classify_refusal(refused.detail, refused.code, self._head_absent_probe)
            if (
                isinstance(error, StorageUnavailable)
                and refused.code == FORBIDDEN
                and is_store_available(self._head_probe)
            ):
                return None  # without list permission absent objects give 403
            raise error from refused

    def _get_blob(self, key: str) -> Any:
        with self._translated_errors("look into it"):
            return self._open_bucket().get_blob(key, **self._request_options)

    def _verified(self, blob: Any) -> StoredObject | None:
        """Return the object if it is complete: as this server wrote it, or an image of another writer."""
        stored, expected = _to_stored_object(blob), (blob.metadata or {}).get(_MD5)
        if not stored.is_complete:
            return None
        if expected is not None:
            return stored if blob.md5_hash in (None, expected) else None
        if not is_image_object(stored.key, stored.content_type):
            return stored
        ends = (
            self.read(stored.key, 0, _SIGNATURE_BYTES),
            self.read(stored.key, max(0, stored.size - _SIGNATURE_BYTES), stored.size),
        )
        return stored if is_complete_file(*ends, stored.size) else None

    def _upload_for_caller(
        self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str], **condition: int
    ) -> StoredObject:
        """Upload under a caller's key. Raises `InvalidInput` if only this key is rejected."""
        try:
            return self._upload(key, data, content_type, metadata, **condition)
        except Refused as refused:
            raise classify_refusal(refused.detail, refused.code, self._write_probe) from refused

    def _head_absent_probe(self) -> None:
        """Request an absent object; raises nothing if these credentials may list the bucket."""
        self._get_blob(f"{self._probe}-none")

    def _head_probe(self) -> None:
        self._get_blob(self._probe)

    def _write_probe(self, **condition: int) -> None:
        """Write the probe exactly as an image is written, so that it fails if every image would."""
        self._upload(self._probe, b"writable", "text/plain", {_WRITER: uuid4().hex}, **condition)

    def _upload(
        self, key: str, data: bytes, content_type: str, metadata: Mapping[str, str], **condition: int
    ) -> StoredObject:
        """Upload and verify, by the checksum in the response or by the stored metadata."""
        from google.api_core.exceptions import PreconditionFailed

        expected = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._translated_errors("write to it", bucket_asked=True):
            blob = self._open_bucket().blob(key)
            blob.metadata = {**metadata, _MD5: expected}
            blob.cache_control = cache_control(metadata)
            blob.content_disposition = content_disposition(key)
            try:
                blob.upload_from_string(data, content_type, **self._request_options, checksum="md5", **condition)
            except PreconditionFailed as error:
                raise ConditionFailed("The storage is busy with other writers of this name.", retry_after=5) from error
            if blob.md5_hash == expected and blob.size == len(data):
                return _to_stored_object(blob)
            there = self._get_blob(key)
            if there is not None and there.size == len(data) and _writer_of(there) == metadata[_WRITER]:
                return _to_stored_object(there)
        raise StorageUnavailable("The storage said that it took a picture, and does not have it.", retry_after=30)

    def _open_bucket(self) -> Any:
        if self._bucket is None:
            raise StorageUnavailable("The storage is not opened yet.")
        return self._bucket

    def _translated_errors(
        self, what: str, *, bucket_asked: bool = False, beyond: bool = False
    ) -> AbstractContextManager[None]:
        return translate_gcs_errors(what, self._options.name, bucket_asked=bucket_asked, beyond=beyond)


def _client(options: GCSOptions) -> Any:
    # Imported here because it takes about 1 s.
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
    from google.oauth2.service_account import Credentials

    if options.credentials is None:
        return storage.Client()
    try:
        credentials = Credentials.from_service_account_file(str(options.credentials), scopes=[_SCOPE])  # type: ignore[no-untyped-call]  # half typed
    except (ValueError, OSError) as error:
        raise DefaultCredentialsError("broken") from error  # type: ignore[no-untyped-call]  # half typed
    return storage.Client(project=credentials.project_id, credentials=credentials)


def _writer_of(blob: Any) -> str | None:
    """Return the random id of the call that wrote the object."""
    return (blob.metadata or {}).get(_WRITER)


def _to_stored_object(blob: Any) -> StoredObject:
    """Return the object that a response describes. Raises `StorageUnavailable` if a field is missing or invalid."""
    etag, kind, metadata = (
        blob.etag or blob.generation,
        blob.content_type or "application/octet-stream",
        blob.metadata or {},
    )
    etag = str(etag).strip('"') if isinstance(etag, str | int) else ""
    if not etag or not isinstance(blob.size, int) or blob.size < 0:
        raise malformed_response("it has no size" if etag else "it has no generation")
    if not (isinstance(kind, str) and f"{kind}{etag}".isascii() and f"{kind}{etag}".isprintable()):  # for a header
        raise malformed_response("its type or its ETag is none")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise malformed_response("its metadata are none")
    record = {name: value for name, value in metadata.items() if name not in (_WRITER, _MD5)}
    return StoredObject(blob.name, blob.size, etag, kind, record)
