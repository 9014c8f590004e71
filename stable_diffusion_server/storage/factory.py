"""Creates the bucket backend that the settings select."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.gcs.bucket import GCSBucket, GCSOptions
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.storage.s3.bucket import S3Bucket
from stable_diffusion_server.storage.s3.client import S3Options

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)*\.[a-z]{2,}")


class StorageOptions(Protocol):
    """The settings that `open_bucket` reads; `settings.StorageSettings` describes each of them."""

    @property
    def storage_provider(self) -> str:
        """STORAGE_PROVIDER."""

    @property
    def local_bucket_dir(self) -> Path:
        """LOCAL_BUCKET_DIR."""

    @property
    def bucket_name(self) -> str:
        """BUCKET_NAME."""

    @property
    def bucket_path(self) -> str:
        """BUCKET_PATH."""

    @property
    def r2_endpoint_url(self) -> str:
        """R2_ENDPOINT_URL."""

    @property
    def public_base_url(self) -> str:
        """PUBLIC_BASE_URL."""

    @property
    def signed_url_seconds(self) -> int:
        """SIGNED_URL_SECONDS."""

    @property
    def signed_url_endpoint(self) -> str:
        """SIGNED_URL_ENDPOINT."""

    @property
    def bucket_acl(self) -> str:
        """BUCKET_ACL."""

    @property
    def storage_timeout(self) -> float:
        """STORAGE_TIMEOUT, in seconds."""

    @property
    def google_application_credentials(self) -> Path | None:
        """GOOGLE_APPLICATION_CREDENTIALS."""

    @property
    def aws_access_key_id(self) -> SecretStr:
        """AWS_ACCESS_KEY_ID."""

    @property
    def aws_secret_access_key(self) -> SecretStr:
        """AWS_SECRET_ACCESS_KEY."""

    @property
    def aws_session_token(self) -> SecretStr:
        """AWS_SESSION_TOKEN."""


def open_bucket(options: StorageOptions) -> Bucket:
    """Create the selected backend. This function makes no request and imports no client; `Bucket.open` connects."""
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
                    signing_url=options.signed_url_endpoint,
                    acl=options.bucket_acl,
                    prefix=options.bucket_path,
                    timeout=options.storage_timeout,
                    credentials=partial(aws_credentials, options),
                )
            )
        case "gcs":
            return GCSBucket(
                GCSOptions(
                    name=options.bucket_name,
                    credentials=options.google_application_credentials,
                    base_url=base_url,
                    signed_url_seconds=options.signed_url_seconds,
                    signing_url=options.signed_url_endpoint,
                    prefix=options.bucket_path,
                    timeout=options.storage_timeout,
                )
            )
    raise ValueError(f"no bucket provider {options.storage_provider!r}")


def aws_credentials(options: StorageOptions) -> tuple[str, str, str]:
    """Return access key, secret key and session token in plain text; empty strings select boto3's default chain."""
    return (
        options.aws_access_key_id.get_secret_value(),
        options.aws_secret_access_key.get_secret_value(),
        options.aws_session_token.get_secret_value(),
    )


def _own_domain(bucket_name: str) -> str:
    """Return `https://NAME` for a bucket named after a domain, such as `static.example.com`; otherwise empty."""
    return f"https://{bucket_name}" if _DOMAIN.fullmatch(bucket_name) else ""
