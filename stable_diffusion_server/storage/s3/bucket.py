"""S3 bucket: AWS, Cloudflare R2, MinIO and other S3-compatible stores."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import structlog

from stable_diffusion_server.errors import (
    KeyBusy,
    NotFound,
    StorageRefused,
    StorageUnavailable,
)
from stable_diffusion_server.imaging import is_complete_file, is_image_object
from stable_diffusion_server.storage.base import Bucket, classify_refusal, is_store_available
from stable_diffusion_server.storage.object_headers import cache_control, content_disposition
from stable_diffusion_server.storage.s3 import objects
from stable_diffusion_server.storage.s3.client import S3Options, make_client
from stable_diffusion_server.storage.s3.errors import (
    FORBIDDEN,
    WRITE,
    ConditionFailed,
    NotSupported,
    RangeNotSatisfiable,
    Refused,
    malformed_response,
    translate_s3_errors,
)
from stable_diffusion_server.types import StoredObject

_log = structlog.get_logger(__name__)

# Object written at each start to test write access and conditional writes, and later to tell whether the store rejects
# one key or every request.
PROBE = ".stable-diffusion-server"
_MAX_CREATE_ATTEMPTS = 5
_SIGNATURE_BYTES = 12
_BROKEN_CACHE_SIZE = 1024


class S3Bucket(Bucket):
    """Objects of an S3 bucket. Thread-safe; methods block on the network.

    Responses are verified: writes by ETag or a HEAD request, objects by checksum or by their first and last bytes.
    """

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._probe = f"{options.prefix.strip('/')}/{PROBE}".lstrip("/")
        self._client: Any = None
        # Signs URLs; the same client unless clients reach the store by another address.
        self._signing_client: Any = None
        self._conditional = True
        self._create_lock = threading.Lock()
        # Whether the last write's ETag was the MD5; not every store does this.
        self._etags_are_md5 = True
        # ETags of objects whose content did not match their checksum when read, by key.
        self._broken: OrderedDict[str, str] = OrderedDict()

    def open(self) -> None:
        """Create the client and write the probe. May be called again after a failure.

        Raises `StorageUnavailable`: missing or wrong credentials, no such bucket, access denied, no response.
        """
        with self._translated_errors(WRITE):
            self._client = self._client or make_client(self._options)
            self._signing_client = self._signing_client or self._make_signing_client()
        self._conditional = self._supports_conditional_writes()
        if not self._conditional:
            _log.warning(
                "the storage ignores conditional writes: of two servers that store one name at once, the last one wins"
            )

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._signing_client.close()

    def stat(self, key: str) -> StoredObject | None:
        """Return the object under `key`; `None` if it is absent, empty, truncated or garbage."""
        head = self._head(key)
        return self._verified(key, head) if head is not None else None

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store `data` if `key` is absent; of concurrent writers the first wins and the others get its object."""
        if not self._conditional:
            return self._create_unconditionally(key, data, content_type, record)
        arguments, condition = self._put_arguments(key, data, content_type, record), {"IfNoneMatch": "*"}
        for turn in range(_MAX_CREATE_ATTEMPTS):
            try:
                return self._put_for_caller(arguments, data, record, **condition), True
            except ConditionFailed:
                head = self._head(key)
            if head is None:
                condition = {"IfNoneMatch": "*"}  # removed meanwhile, or another write is in progress
                time.sleep(0.05 * turn)
            elif (there := self._verified(key, head)) is not None or not data:
                # After a lost response the client repeats the write: then the earlier writer is this call.
                return there or objects.to_stored_object(key, head), objects.metadata_of(head).get(
                    objects.WRITER
                ) == arguments["Metadata"][objects.WRITER]
            else:
                condition = {"IfMatch": head["ETag"]}  # replace an empty, truncated or garbage object
        raise KeyBusy("The storage is busy with other writers of this name.", retry_after=5)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store `data` under `key`; readers get the old object or the new one."""
        return self._put_for_caller(self._put_arguments(key, data, content_type, record), data, record)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive). Raises `NotFound`, also for a wrong checksum."""
        if end is not None and end <= start:
            return b""
        try:
            with self._translated_errors("read from it", named=True):
                return self._read(key, start, end)
        except RangeNotSatisfiable:
            return b""
        except Refused as refused:
            raise classify_refusal(refused.detail, refused.code, self._head_probe) from refused

    def delete(self, key: str) -> None:
        """Remove the object if it exists."""
        try:
            with suppress(NotFound), self._translated_errors("delete from it", named=True):
                self._open_client().delete_object(Bucket=self._options.name, Key=key)
        except Refused as refused:  # credentials may write but not delete: not an outage
            raise StorageRefused(refused.detail) from refused

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with `prefix`, sorted."""
        with self._translated_errors("list it"):
            pages = self._open_client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._options.name, Prefix=prefix):
                if not {"Name", "KeyCount", "Contents"} & set(page):
                    raise malformed_response("it is no list of objects")
                for item in page.get("Contents", ()):
                    if item["Size"] and item["Key"] != self._probe:
                        yield item["Key"]

    def url(self, key: str) -> str | None:
        """Return a signed URL if `signed_url_seconds` is set, otherwise the URL below the base URL.

        Returns `None` without both, because the public address is unknown.
        """
        seconds, base = self._options.signed_url_seconds, self._options.base_url
        if not seconds:
            return f"{base}/{quote(key, safe='/')}" if base else None
        with self._translated_errors("sign for it"):
            named = {"Bucket": self._options.name, "Key": key}
            signing = self._signing_client or self._open_client()
            return str(signing.generate_presigned_url("get_object", Params=named, ExpiresIn=seconds))

    def _head(self, key: str) -> Any:
        """Return the response to HEAD, or `None` if the object is absent.

        Raises `InvalidInput` if only this key is rejected.
        """
        try:
            return self._head_or_raise(key)
        except NotFound:
            return None
        except Refused as refused:
            error = classify_refusal(refused.detail, refused.code, self._head_absent_probe)
            if (
                isinstance(error, StorageUnavailable)
                and refused.code in FORBIDDEN
                and is_store_available(self._head_probe)
            ):
                return None  # without list permission absent objects give 403
            raise error from refused

    def _head_or_raise(self, key: str) -> Any:
        with self._translated_errors("look into it", named=True):
            return self._open_client().head_object(Bucket=self._options.name, Key=key)

    def _verified(self, key: str, head: Any) -> StoredObject | None:
        """Return the object of a HEAD response if complete: as this server wrote it, or another writer's image."""
        stored, metadata = objects.to_stored_object(key, head), objects.metadata_of(head)
        if not stored.is_complete or self._broken.get(key) == stored.etag:
            return None
        if objects.MD5 in metadata:
            comparable = self._etags_are_md5 and not objects.has_opaque_etag(head)
            if not comparable or "-" in metadata[objects.MD5] + stored.etag or metadata[objects.MD5] == stored.etag:
                return stored
            # Read the object before treating it as damaged, because some stores' ETags only look like an MD5.
            return stored if self._is_readable(key) else None
        if not is_image_object(key, stored.content_type):
            return stored
        ends = self.read(key, 0, _SIGNATURE_BYTES), self.read(key, max(0, stored.size - _SIGNATURE_BYTES), stored.size)
        return stored if is_complete_file(*ends, stored.size) else None

    def _is_readable(self, key: str) -> bool:
        try:
            self.read(key)
        except NotFound:
            return False
        return True

    def _read(self, key: str, start: int, end: int | None) -> bytes:
        whole = not start and end is None
        part = {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        answer = self._open_client().get_object(Bucket=self._options.name, Key=key, **part)
        data = objects.read_body(answer, start, end)
        expected = objects.metadata_of(answer).get(objects.MD5) if whole else None
        if expected is not None and expected != objects.expected_etag(data):
            self._broken[key] = objects.etag_of(answer)
            while len(self._broken) > _BROKEN_CACHE_SIZE:
                self._broken.popitem(last=False)
            raise NotFound("What is stored under this name is not what was written there.")
        return data

    def _put_arguments(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "Bucket": self._options.name,
            "Key": key,
            "ContentType": content_type,
            "Metadata": {
                **objects.to_metadata(record),
                objects.WRITER: uuid4().hex,
                objects.MD5: objects.expected_etag(data),
            },
            "CacheControl": cache_control(record),
            "ContentDisposition": content_disposition(key),
            **({"ACL": self._options.acl} if self._options.acl else {}),
        }

    def _put_for_caller(
        self, arguments: dict[str, Any], data: bytes, record: Mapping[str, str], **condition: str
    ) -> StoredObject:
        """Put an object under a caller's key. Raises `InvalidInput` if only this key is rejected."""
        try:
            return self._put(arguments, data, record, **condition)
        except Refused as refused:
            raise classify_refusal(refused.detail, refused.code, self._write_probe) from refused

    def _put(self, arguments: dict[str, Any], data: bytes, record: Mapping[str, str], **condition: str) -> StoredObject:
        with self._translated_errors(WRITE):
            etag = objects.etag_of(objects.put_object(self._open_client(), arguments, data, condition))
        self._etags_are_md5 = etag == arguments["Metadata"][objects.MD5]
        if not self._etags_are_md5:
            etag = self._verify_written(arguments, len(data))
        return StoredObject(arguments["Key"], len(data), etag, arguments["ContentType"], dict(record))

    def _verify_written(self, arguments: dict[str, Any], size: int) -> str:
        """Return the ETag of the object just written, by HEAD, when the ETag of the response is not the MD5."""
        try:
            head = self._head_or_raise(arguments["Key"])
        except NotFound:
            head = {}
        if (
            head.get("ContentLength") != size
            or objects.metadata_of(head).get(objects.WRITER) != arguments["Metadata"][objects.WRITER]
        ):
            raise StorageUnavailable("The storage said that it took a picture, and does not have it.", retry_after=30)
        return objects.to_stored_object(arguments["Key"], head).etag

    def _head_absent_probe(self) -> None:
        """Request an absent object; raises `NotFound` if these credentials may list the bucket."""
        self._head_or_raise(f"{self._probe}-none")

    def _head_probe(self) -> None:
        self._head_or_raise(self._probe)

    def _write_probe(self, **condition: str) -> None:
        """Write the probe exactly as an image is written, so that it fails if every image would."""
        data = b"writable"
        self._put(self._put_arguments(self._probe, data, "text/plain", {}), data, {}, **condition)

    def _create_unconditionally(
        self, key: str, data: bytes, content_type: str, record: Mapping[str, str]
    ) -> tuple[StoredObject, bool]:
        """HEAD, then PUT, for stores without conditional writes: atomic within this process only."""
        with self._create_lock:
            there = self.stat(key)
            return (there, False) if there is not None else (self.overwrite(key, data, content_type, record), True)

    def _supports_conditional_writes(self) -> bool:
        """Return whether the store rejects a second conditional write, as it must. Raises the errors of a write."""
        for _ in range(2):
            try:
                self._write_probe(IfNoneMatch="*")
            except ConditionFailed:
                return True
            except NotSupported:
                self._write_probe()
        return False

    def _make_signing_client(self) -> Any:
        endpoint = self._options.signing_url
        return make_client(replace(self._options, endpoint_url=endpoint)) if endpoint else self._client

    def _open_client(self) -> Any:
        if self._client is None:
            raise StorageUnavailable("The storage is not opened yet.")
        return self._client

    def _translated_errors(self, what: str, *, named: bool = False) -> AbstractContextManager[None]:
        return translate_s3_errors(what, self._options.name, named=named, acl=self._options.acl)
