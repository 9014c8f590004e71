"""What users of a bucket set wrongly, and what clients see of it: ACLs, signed URLs of another address, file names."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from storage_servers import (
    KEYS,
    MisbehavingStore,
    StorageServer,
    make_s3_bucket,
    opened,
    r2_options,
    refused,
    storage_options,
)

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.storage import check_bucket, content_disposition
from stable_diffusion_server.storage.factory import open_bucket

RECORD = {"digest": "abc"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status"), [("AccessControlListNotSupported", 400), ("NotImplemented", 501), ("AccessDenied", 403)]
)
def test_a_bucket_without_acls_names_the_setting(
    s3_server: StorageServer, rascal_before: Callable[[StorageServer], MisbehavingStore], code: str, status: int
) -> None:
    """At the start, in every line of check-storage, and of a write; without BUCKET_ACL it works."""
    store, name = rascal_before(s3_server), make_s3_bucket(s3_server)
    store.rule = lambda method, path, headers: (
        refused(code, status) if any(header.lower() == "x-amz-acl" for header in headers) else ""
    )
    bucket = open_bucket(r2_options(store.url, name, bucket_acl="public-read"))
    with pytest.raises(StorageUnavailable, match="BUCKET_ACL"):
        bucket.open()
    with pytest.raises(StorageUnavailable, match="BUCKET_ACL"):
        bucket.create("a", b"data", "text/plain", RECORD)
    failed = [fault for _, fault in check_bucket(bucket, "check", lambda url: b"") if fault is not None]
    assert "BUCKET_ACL" in failed[0]
    assert code in failed[0]
    assert opened(r2_options(store.url, name)).create("a", b"data", "text/plain", RECORD)[1]


@pytest.mark.slow
def test_a_signed_url_has_the_address_that_clients_reach(
    s3_server: StorageServer, rascal_before: Callable[[StorageServer], MisbehavingStore]
) -> None:
    """Objects are written at R2_ENDPOINT_URL, and signed for SIGNED_URL_ENDPOINT; PUBLIC_BASE_URL is no part of it."""
    outside, name = rascal_before(s3_server), make_s3_bucket(s3_server)
    options = {"signed_url_seconds": 60, "public_base_url": "https://cdn.example"}
    bucket = opened(r2_options(s3_server.url, name, signed_url_endpoint=outside.url, **options))
    bucket.create("a b/猫.webp", b"data", "image/webp", RECORD)
    url = bucket.url("a b/猫.webp") or ""
    assert url.startswith(f"{outside.url}/{name}/a%20b/")
    assert "X-Amz-Signature" in url
    assert outside.requests == []
    assert httpx.get(url).content == b"data"
    inside = opened(r2_options(s3_server.url, name, **options)).url("k") or ""
    assert inside.startswith(f"{s3_server.url}/{name}/k?")
    # The signature is made for the outer host, so it differs.
    signatures = {re.search("X-Amz-Signature=([0-9a-f]+)", one)[1] for one in (bucket.url("k") or "", inside)}  # type: ignore[index]  # both have one
    assert len(signatures) == 2


def test_a_signed_url_is_made_without_a_request() -> None:
    """The outer address need not be reachable from this server; nothing listens at either one here."""
    options = storage_options(
        storage_provider="s3", bucket_name="pictures", r2_endpoint_url="http://127.0.0.1:9", signed_url_seconds=60,
        signed_url_endpoint="https://cdn.example:8443", storage_timeout=0.5, **KEYS,
    )  # fmt: skip
    bucket = open_bucket(options)
    with pytest.raises(StorageUnavailable):
        bucket.open()
    parts = urlsplit(bucket.url("a/k.webp") or "")
    assert (parts.scheme, parts.netloc, parts.path) == ("https", "cdn.example:8443", "/pictures/a/k.webp")


NAMES = {
    "a.webp": "a.webp",
    "写真.webp": "picture.webp",
    "a/写真.png": "picture.png",
    "🟥.jpeg": "picture.jpeg",
    "写真 2.webp": "2.webp",
    "写真": "picture",
    "写真.写真": "picture",
    "_写_.webp": "picture.webp",
    "Ünïcödé.webp": "Unicode.webp",
    'a"b\\c.webp': "a_b_c.webp",
    "a;b=c.webp": "a_b_c.webp",
    "...": "picture",
}


@pytest.mark.parametrize(("key", "plain"), NAMES.items())
def test_a_file_name_has_a_plain_form_with_its_extension(key: str, plain: str) -> None:
    """Old programs read `filename`, others `filename*`, which is the exact name (RFC 6266)."""
    header = content_disposition(key)
    assert header.isascii()
    assert re.match(r'inline; filename="([^"]*)"', header)[1] == plain  # type: ignore[index]  # always there
    name = key.rpartition("/")[2]
    exact = re.search(r"; filename\*=UTF-8''(\S+)$", header)
    assert (unquote(exact[1]) if exact else plain) == name
