"""S3 object format: metadata headers, checksums, multipart upload, parsing of responses."""

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
    """The record as header values, percent-encoded where not plain ASCII. Raises `StorageRefused` beyond 2 KB."""
    # Leading and trailing spaces are encoded, because HTTP strips them.
    metadata = {
        name: quote(value, safe=_PLAIN if value == value.strip() else _PLAIN.strip()) for name, value in record.items()
    }
    if sum(len(name) + len(value) for name, value in metadata.items()) > RECORD_MAX_BYTES - _RESERVED_BYTES:
        raise StorageRefused(f"The picture's record has more than the {RECORD_MAX_BYTES} bytes that a store takes.")
    if any(name != name.lower() or name in (WRITER, MD5) for name in metadata):
        raise ValueError(f"names in a record are lower case, and {WRITER!r} and {MD5!r} are taken")
    return metadata


def metadata_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a response, with names in lower case, because some stores change the case."""
    return {str(name).lower(): str(value) for name, value in (answer.get("Metadata") or {}).items()}


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag without quotes; empty if there is none."""
    return str(answer.get("ETag") or "").removeprefix("W/").strip('"')


def to_stored_object(key: str, head: Mapping[str, Any]) -> StoredObject:
    """The object described by a HEAD response. Raises `StorageUnavailable` without ETag or length."""
    etag, size = etag_of(head), head.get("ContentLength")
    if not etag or not isinstance(size, int):
        raise malformed_response("it has no ETag" if not etag else "it has no length")
    record = {name: unquote(value) for name, value in metadata_of(head).items() if name not in (WRITER, MD5)}
    return StoredObject(key, size, etag, str(head.get("ContentType") or "application/octet-stream"), record)


def read_body(answer: Mapping[str, Any], start: int, end: int | None) -> bytes:
    """The bytes `start` to `end` (exclusive) of a GET response.

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
    """Whether encryption makes the ETag something other than the MD5 (SSE-KMS, SSE-C)."""
    return "kms" in str(head.get("ServerSideEncryption")) or bool(head.get("SSECustomerAlgorithm"))


def expected_etag(data: bytes) -> str:
    """The ETag of `data` in a store with MD5 ETags, for one PUT or a multipart upload."""
    if len(data) <= PART_BYTES:
        return _md5(data).hex()
    sums = [_md5(part) for part in _parts(data)]
    return f"{_md5(b''.join(sums)).hex()}-{len(sums)}"


def put_object(client: Any, arguments: dict[str, Any], data: bytes, condition: Mapping[str, str]) -> Any:
    """Put an object, in parts if it is large; returns the response of the last request, which has the condition."""
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
    """`data` in parts; a broken connection then costs one part."""
    return [data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES)]


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _content_md5(data: bytes) -> str:
    return base64.b64encode(_md5(data)).decode()
