"""A bucket behind the S3 interface: Cloudflare R2, AWS, MinIO and the like. Knows no files and no HTTP doors."""

from __future__ import annotations

import base64
import hashlib
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote
from uuid import uuid4

import structlog

from stable_diffusion_server.buckets.s3.faults import LOST, BeyondTheEnd, ConditionFailed, code_of, told
from stable_diffusion_server.errors import NotFound, StorageUnavailable
from stable_diffusion_server.orders import Stored
from stable_diffusion_server.presenting import caching_of, disposition_of

_log = structlog.get_logger(__name__)

# An object of this name shows, at each start, that writing is allowed and what a conditional write does here.
PROBE = ".stable-diffusion-server"
PART_BYTES = 16 * 2**20
# S3's bound on what an object tells about itself, names and values together.
RECORD_MAX_BYTES = 2048
_WRITER = "writer"
_PLAIN = "".join(set(string.printable) - set("%" + string.whitespace)) + " "
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class S3Options:
    """Where the bucket is and how it is reached.

    `timeout` in seconds, for each of three tries; empty `credentials` leave it to boto3's own chain.
    """

    name: str
    endpoint_url: str = ""
    region: str = ""
    base_url: str = ""
    signed_url_seconds: int = 0
    acl: str = ""
    prefix: str = ""
    timeout: float = 10.0
    credentials: Callable[[], tuple[str, str, str]] = lambda: ("", "", "")


class S3Bucket:
    """Objects of an S3 bucket. Every method is safe from any thread and blocks for network time."""

    def __init__(self, options: S3Options) -> None:
        self._options = options
        self._probe = f"{options.prefix.strip('/')}/{PROBE}".lstrip("/")
        self._client: Any = None
        self._conditional = True
        self._one_by_one = threading.Lock()

    def open(self) -> None:
        """Make the client, and try that the bucket can be written. May be called again after a failure.

        Raises `StorageUnavailable` with one sentence: no or wrong credentials, no such bucket, denied, no answer.
        """
        with self._told("write to it"):
            self._client = self._client or _client(self._options)
            self._conditional = self._tries_conditional_writes()
        if not self._conditional:
            _log.warning(
                "the storage ignores conditional writes: of two servers that store one name at once, the last one wins"
            )

    def close(self) -> None:
        """Let the connections go."""
        if self._client is not None:
            self._client.close()

    def fault(self) -> str | None:
        """Nothing is remembered here; every call tells its own fault."""
        return None

    def admit(self) -> None:
        """A store without a bound on its size."""

    def stat(self, key: str) -> Stored | None:
        """The object under `key`, or `None`; one that is empty or cut short is none."""
        head = self._head(key)
        stored = self._stored(key, head) if head is not None else None
        return stored if stored is not None and stored.whole else None

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[Stored, bool]:
        """Store `data` if `key` is absent; the first of several writers wins and the others get what it stored."""
        if not self._conditional:
            return self._create_unguarded(key, data, content_type, record)
        about, condition = self._about(key, content_type, record), {"IfNoneMatch": "*"}
        for turn in range(_ROUNDS):
            try:
                return self._put(about, data, record, **condition), True
            except ConditionFailed:
                head = self._head(key)
            if head is None:
                condition = {"IfNoneMatch": "*"}  # removed meanwhile, or another writer is at it right now
                time.sleep(0.05 * turn)
            elif (there := self._stored(key, head)).whole or not data:
                # An answer may be lost on its way and the write repeated: then the one who was first is oneself.
                return there, head["Metadata"].get(_WRITER) == about["Metadata"][_WRITER]
            else:
                condition = {"IfMatch": head["ETag"]}  # one that is empty or cut short is none, and gives way
        raise StorageUnavailable("The storage is busy with other writers of this name.", retry_after=5)

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> Stored:
        """Store `data` under `key`; a reader sees the old object or the new one, whole."""
        return self._put(self._about(key, content_type, record), data, record)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to before `end`. Raises `NotFound`."""
        if end is not None and end <= start:
            return b""
        part = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        try:
            with self._told("read from it"):
                answer = self._connected().get_object(Bucket=self._options.name, Key=key, **part)
                with answer["Body"] as body:
                    return bytes(body.read())
        except BeyondTheEnd:
            return b""

    def delete(self, key: str) -> None:
        """Remove the object, if there is one."""
        with self._told("delete from it"):
            self._connected().delete_object(Bucket=self._options.name, Key=key)

    def list(self, prefix: str = "") -> Iterator[str]:
        """The keys that begin with `prefix`, in order."""
        with self._told("list it"):
            pages = self._connected().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._options.name, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if item["Size"] and item["Key"] != self._probe:
                        yield item["Key"]

    def url(self, key: str) -> str | None:
        """Where the object is fetched: signed for a while where the bucket is private, else below the base URL.

        `None` without either: nothing is known of an address that opens.
        """
        seconds, base = self._options.signed_url_seconds, self._options.base_url
        if not seconds:
            return f"{base}/{quote(key, safe='/')}" if base else None
        with self._told("sign for it"):
            named = {"Bucket": self._options.name, "Key": key}
            return str(self._connected().generate_presigned_url("get_object", Params=named, ExpiresIn=seconds))

    def _head(self, key: str) -> Any:
        try:
            with self._told("look into it"):
                return self._connected().head_object(Bucket=self._options.name, Key=key)
        except NotFound:
            return None

    def _about(self, key: str, content_type: str, record: Mapping[str, str]) -> dict[str, Any]:
        return {
            "Bucket": self._options.name,
            "Key": key,
            "ContentType": content_type,
            "Metadata": {**_as_metadata(record), _WRITER: uuid4().hex},
            "CacheControl": caching_of(record),
            "ContentDisposition": disposition_of(key),
            **({"ACL": self._options.acl} if self._options.acl else {}),
        }

    def _put(self, about: dict[str, Any], data: bytes, record: Mapping[str, str], **condition: str) -> Stored:
        with self._told("write to it"):
            client = self._connected()
            if len(data) <= PART_BYTES:
                answer = client.put_object(**about, Body=data, ContentMD5=_md5(data), **condition)
            else:
                answer = _put_in_parts(client, about, data, condition)
            return Stored(about["Key"], len(data), answer["ETag"].strip('"'), about["ContentType"], dict(record))

    def _create_unguarded(
        self, key: str, data: bytes, content_type: str, record: Mapping[str, str]
    ) -> tuple[Stored, bool]:
        """Look, then write: the best there is without conditional writes, and exact within this process."""
        with self._one_by_one:
            there = self.stat(key)
            return (there, False) if there is not None else (self.overwrite(key, data, content_type, record), True)

    def _tries_conditional_writes(self) -> bool:
        """Whether a second write under a condition is refused, as it must be. Raises what writing raises."""
        probe = {"Bucket": self._options.name, "Key": self._probe, "Body": b"writable"}
        for _ in range(2):
            try:
                self._client.put_object(**probe, IfNoneMatch="*")
            except Exception as error:
                code = code_of(error)
                if code in LOST:
                    return True
                if code not in ("NotImplemented", "501"):
                    raise
                self._client.put_object(**probe)
        return False

    def _stored(self, key: str, head: Any) -> Stored:
        record = {name: unquote(value) for name, value in head["Metadata"].items() if name != _WRITER}
        content_type = head.get("ContentType") or "application/octet-stream"
        return Stored(key, head["ContentLength"], head["ETag"].strip('"'), content_type, record)

    def _connected(self) -> Any:
        if self._client is None:
            raise StorageUnavailable("The storage is not opened yet.")
        return self._client

    def _told(self, what: str) -> AbstractContextManager[None]:
        return told(what, self._options.name)


def _put_in_parts(client: Any, about: dict[str, Any], data: bytes, condition: Mapping[str, str]) -> Any:
    """Send a big object part by part, so that a broken connection costs one part; the last act has the condition."""
    upload = client.create_multipart_upload(**about)["UploadId"]
    this = {"Bucket": about["Bucket"], "Key": about["Key"], "UploadId": upload}
    try:
        done = []
        for number, start in enumerate(range(0, len(data), PART_BYTES), 1):
            part = data[start : start + PART_BYTES]
            answer = client.upload_part(**this, PartNumber=number, Body=part, ContentMD5=_md5(part))
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        return client.complete_multipart_upload(**this, MultipartUpload={"Parts": done}, **condition)
    except Exception:
        client.abort_multipart_upload(**this)
        raise


def _client(options: S3Options) -> Any:
    # Imported here: it takes most of a second, and only those who use it should pay.
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(*(value or None for value in options.credentials()))
    config = Config(
        connect_timeout=min(5.0, options.timeout),
        read_timeout=options.timeout,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=32,
        signature_version="s3v4",
        # The newer checksums are AWS's own; R2 and others refuse or ignore them. Content-MD5 is understood by all.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if options.endpoint_url else "auto"},
    )
    region = options.region or session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=options.endpoint_url or None, region_name=region, config=config)


def _as_metadata(record: Mapping[str, str]) -> dict[str, str]:
    """The record as header values: what is no plain ASCII is percent-encoded. Raises `ValueError` beyond 2 KB."""
    # Spaces at the ends would be lost in a header.
    metadata = {
        name: quote(value, safe=_PLAIN if value == value.strip() else _PLAIN.strip()) for name, value in record.items()
    }
    if sum(len(name) + len(value) for name, value in metadata.items()) > RECORD_MAX_BYTES - 64:
        raise ValueError(f"a record of more than {RECORD_MAX_BYTES} bytes")
    if any(name != name.lower() or name == _WRITER for name in metadata):
        raise ValueError("names in a record are lower case, and 'writer' is taken")
    return metadata


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
