"""S3 object format: makes metadata headers and checksums, uploads in parts, parses responses."""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

from stable_diffusion_server.errors import StorageRefused
from stable_diffusion_server.storage.s3.errors import malformed_response
from stable_diffusion_server.types import StoredObject

PART_BYTES = 16 * 2**20
# S3's limit on the metadata of an object, names and values together.
RECORD_MAX_BYTES = 2048
# Metadata beside the record: a random id of the writing call, and the ETag expected where ETags are MD5.
WRITER, MD5 = "writer", "md5"
_RESERVED_BYTES = 128
_PLAIN = "".join(set(string.printable) - set("%" + string.whitespace)) + " "


def to_metadata(record: Mapping[str, str]) -> dict[str, str]:
    """Return the record as header values, percent-encoded unless plain ASCII. Raises `StorageRefused` beyond 2 KB."""
    # Encode leading and trailing spaces too, because HTTP strips them.
    metadata = {
        name: quote(value, safe=_PLAIN if value == value.strip() else _PLAIN.strip()) for name, value in record.items()
    }
    if sum(len(name) + len(value) for name, value in metadata.items()) > RECORD_MAX_BYTES - _RESERVED_BYTES:
        raise StorageRefused(f"The picture's record has more than the {RECORD_MAX_BYTES} bytes that a store takes.")
    if any(name != name.lower() or name in (WRITER, MD5) for name in metadata):
        raise ValueError(f"names in a record are lower case, and {WRITER!r} and {MD5!r} are taken")
    return metadata


def metadata_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a response, with names in lower case, because some stores change the case."""
    return {str(name).lower(): str(value) for name, value in (answer.get("Metadata") or {}).items()}


def etag_of(answer: Mapping[str, Any]) -> str:
    """Return the ETag without quotes; empty if there is none."""
    return str(answer.get("ETag") or "").removeprefix("W/").strip('"')


def to_stored_object(key: str, head: Mapping[str, Any]) -> StoredObject:
    """Return the object that a HEAD response describes. Raises `StorageUnavailable` without ETag or length."""
    etag, size = etag_of(head), head.get("ContentLength")
    if not etag or not isinstance(size, int):
        raise malformed_response("it has no ETag" if not etag else "it has no length")
    record = {name: unquote(value) for name, value in metadata_of(head).items() if name not in (WRITER, MD5)}
    return StoredObject(key, size, etag, str(head.get("ContentType") or "application/octet-stream"), record)


def read_body(answer: Mapping[str, Any], start: int, end: int | None) -> bytes:
    """Return the bytes `start` to `end` (exclusive) of a GET response.

    Raises `StorageUnavailable` for an invalid response, and the errors of reading the body.
    """
    with answer["Body"] as body:
        data = bytes(body.read())
    if not etag_of(answer):
        raise malformed_response("it has no ETag")
    if answer["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.PARTIAL_CONTENT:
        return data
    if not data:
        raise malformed_response("an object without bytes")
    return data[start:end]  # a store or proxy without range support sends the whole object


def has_opaque_etag(head: Mapping[str, Any]) -> bool:
    """Return whether encryption (SSE-KMS, SSE-C) makes the ETag differ from the MD5."""
    return "kms" in str(head.get("ServerSideEncryption")) or bool(head.get("SSECustomerAlgorithm"))


def expected_etag(data: bytes) -> str:
    """Return the ETag of `data` in a store with MD5 ETags, for one PUT or a multipart upload."""
    if len(data) <= PART_BYTES:
        return _md5(data).hex()
    sums = [_md5(part) for part in _parts(data)]
    return f"{_md5(b''.join(sums)).hex()}-{len(sums)}"


def put_object(client: Any, arguments: dict[str, Any], data: bytes, condition: Mapping[str, str]) -> Any:
    """Put an object, in parts of 16 MiB if larger; return the response of the last request, which has the condition."""
    if len(data) <= PART_BYTES:
        return client.put_object(**arguments, Body=data, ContentMD5=_content_md5(data), **condition)
    upload = client.create_multipart_upload(**arguments)["UploadId"]
    this = {"Bucket": arguments["Bucket"], "Key": arguments["Key"], "UploadId": upload}
    try:
        done = []
        for number, part in enumerate(_parts(data), 1):
            answer = client.upload_part(**this, PartNumber=number, Body=part, ContentMD5=_content_md5(part))
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        return client.complete_multipart_upload(**this, MultipartUpload={"Parts": done}, **condition)
    except Exception:
        with suppress(Exception):  # report the first error
            client.abort_multipart_upload(**this)
        raise


def _parts(data: bytes) -> list[bytes]:
    """Split `data` into parts of 16 MiB, so that a broken connection costs only one part."""
    return [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _content_md5(data: bytes) -> str:
    return base64.b64encode(_md5(data)).decode()
