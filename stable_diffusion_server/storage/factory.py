"""Opens the bucket that the settings name."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import SecretStr

from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.gcs.bucket import GCSBucket, GCSOptions
from stable_diffusion_server.storage.local import LocalBucket
from stable_diffusion_server.storage.s3.bucket import S3Bucket
from stable_diffusion_server.storage.s3.client import S3Options

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)*\.[a-z]{2,}")


_EMPTY = SecretStr("")


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


def _own_domain(bucket_name: str) -> str:
    """The base URL of a bucket named after its own domain, as in `static.example.com`; empty for any other name."""
    return f"https://{bucket_name}" if _DOMAIN.fullmatch(bucket_name) else ""
