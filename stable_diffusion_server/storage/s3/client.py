"""Options and boto3 client of an S3 store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class S3Options:
    """Name, address and access of a bucket.

    `timeout` in seconds, for each of three tries; empty `credentials` select boto3's default chain. `signing_url` is
    the endpoint in signed URLs, if clients reach the store by another address than this server.
    """

    name: str
    endpoint_url: str = ""
    region: str = ""
    base_url: str = ""
    signed_url_seconds: int = 0
    signing_url: str = ""
    acl: str = ""
    prefix: str = ""
    timeout: float = 10.0
    credentials: Callable[[], tuple[str, str, str]] = lambda: ("", "", "")


def make_client(options: S3Options) -> Any:
    """Create the boto3 client. Raises boto3's errors for invalid credentials or profiles."""
    # Imported here because it takes most of a second.
    import boto3
    from botocore.config import Config

    session = boto3.session.Session(*(value or None for value in options.credentials()))
    config = Config(
        connect_timeout=min(5.0, options.timeout),
        read_timeout=options.timeout,
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=32,
        signature_version="s3v4",
        # R2 and other stores reject or ignore AWS's newer checksums; all support Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if options.endpoint_url else "auto"},
    )
    region = options.region or session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=options.endpoint_url or None, region_name=region, config=config)
