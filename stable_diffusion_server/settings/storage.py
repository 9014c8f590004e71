"""Settings of the bucket, the existence cache, the history and DATA_DIR."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator

from stable_diffusion_server.settings.base import SettingsGroup, none_if_empty

# Paths that belong to the endpoint of a service (Supabase).
_ENDPOINT_PATHS = ("/storage/v1/s3",)
# Services whose buckets also have host names of their own, below the account's.
_CLOUDS = (
    ".amazonaws.com",
    ".r2.cloudflarestorage.com",
    ".digitaloceanspaces.com",
    ".backblazeb2.com",
    ".wasabisys.com",
)
# What the stores' own clients take: a name, or the ARN of an access point.
_BUCKET_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:[A-Za-z0-9:/._-]{1,500}")


def _name_hint(name: str) -> str:
    """Return what BUCKET_NAME should be instead of an address or a path."""
    scheme, separator, rest = name.partition("://")
    bucket, _, folder = rest.partition("/") if separator else name.partition("/")
    if separator and scheme.lower() in ("http", "https"):
        return "give the name alone; the address belongs in R2_ENDPOINT_URL or PUBLIC_BASE_URL"
    if not _BUCKET_NAME.fullmatch(bucket):
        return "give letters, digits, dots and dashes alone"
    return f"give {bucket} alone" + (f", and {folder.strip('/')} as BUCKET_PATH" if folder.strip("/") else "")


class StorageSettings(SettingsGroup):
    """Where images are stored, and what the server keeps about them."""

    storage_provider: Literal["local", "r2", "s3", "gcs"] = Field(
        "local",
        description="Where images are stored: `local`, a folder; `r2`, `s3` (AWS and compatible) or `gcs`, a bucket.",
    )
    bucket_name: str = Field("", description="Name of the bucket; required for `r2`, `s3` and `gcs`.")
    bucket_path: str = Field("static/uploads", description="Prefix of all object keys. May be empty.")
    local_bucket_dir: Path = Field(Path("bucket"), description="Folder of the local bucket.")
    r2_endpoint_url: str = Field(
        "", description="URL of the S3 API; required for `r2`, and for an `s3` that is not AWS."
    )
    google_application_credentials: Annotated[Path | None, BeforeValidator(none_if_empty)] = Field(
        None, description="Key file of a Google service account. Empty: Google's default credentials."
    )
    aws_access_key_id: SecretStr = Field(
        SecretStr(""),
        description="Access key for `r2` and `s3`. Empty: AWS's default credentials (environment, profile, role).",
    )
    aws_secret_access_key: SecretStr = Field(SecretStr(""), description="Secret of the access key.")
    aws_session_token: SecretStr = Field(SecretStr(""), description="Session token of a temporary access key.")
    bucket_acl: str = Field(
        "",
        pattern=r"^(|private|public-read|bucket-owner-full-control)$",
        description="Canned ACL sent with each `s3` object, such as `public-read`. Empty: none, which R2 needs.",
    )
    signed_url_seconds: int = Field(
        0,
        ge=0,
        le=604_800,
        description="For private buckets: how long the signed URLs in responses are valid. 0: URLs are not signed.",
    )
    signed_url_endpoint: str = Field(
        "",
        description=(
            "Public URL of the store, for signed URLs, if clients reach it by another address than this server "
            "(R2_ENDPOINT_URL). Needs SIGNED_URL_SECONDS."
        ),
    )
    url_secret: SecretStr = Field(
        SecretStr(""),
        description=(
            "Secret that signs this server's own URLs and, with API_KEYS, derives object keys and marks the owner of "
            "an image; servers that share a bucket need the same. Empty: one is generated in DATA_DIR."
        ),
    )
    storage_timeout: float = Field(
        10.0,
        gt=0,
        le=300,
        allow_inf_nan=False,
        description="Seconds to wait for the bucket; after that the image is spooled and uploaded later.",
    )
    spool_bytes: int = Field(
        1_073_741_824, ge=0, description="Maximum bytes of images spooled in DATA_DIR while the bucket is down."
    )
    existence_cache_size: int = Field(
        100_000,
        ge=0,
        description="Maximum number of keys cached as stored; 0 asks the bucket each time.",
    )
    existence_cache_ttl: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds a key stays cached; deletions by other processes are noticed after that.",
    )
    history_entries: int = Field(
        100_000,
        ge=0,
        le=10_000_000,
        description="Maximum number of images in the history, in DATA_DIR; 0: no history.",
    )
    history_days: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Days after which an image leaves the history; 0: never."
    )
    data_dir: Path = Field(
        Path("data"), description="Folder of the server's own state: job store, spool, history, `progress.txt`."
    )
    embed_metadata: Literal["full", "digest", "none"] = Field(
        "full",
        description=(
            "Provenance written into the image file: `full`, all parameters; `digest`, one number; both with IPTC's "
            "mark of generated images in XMP. `none`: nothing, and no mark."
        ),
    )

    @field_validator("r2_endpoint_url", "signed_url_endpoint")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError("is not an http or https address")
        if "@" in parts.netloc:
            raise ValueError("must not hold credentials")
        if parts.path.strip("/") and not parts.path.rstrip("/").endswith(_ENDPOINT_PATHS):
            raise ValueError(f"has a path: give {parts.scheme}://{parts.netloc} alone, and the bucket as BUCKET_NAME")
        return value.rstrip("/")

    def storage_fault(self) -> str:
        """Return a sentence about storage settings that do not fit together; empty if they do."""
        if self.storage_provider == "local":
            return ""
        if not self.bucket_name:
            return f"BUCKET_NAME is needed with STORAGE_PROVIDER={self.storage_provider}"
        if not _BUCKET_NAME.fullmatch(self.bucket_name):
            return f"BUCKET_NAME {self.bucket_name[:100]!r} is no name of a bucket: {_name_hint(self.bucket_name)}"
        if self.storage_provider == "r2" and not self.r2_endpoint_url:
            return "R2_ENDPOINT_URL is needed with STORAGE_PROVIDER=r2"
        for name, url in (("R2_ENDPOINT_URL", self.r2_endpoint_url), ("SIGNED_URL_ENDPOINT", self.signed_url_endpoint)):
            host = urlsplit(url).hostname or ""
            if host.startswith(f"{self.bucket_name}.") and host.endswith(_CLOUDS):
                return f"{name} begins with the bucket's name: give the account's address without {self.bucket_name}"
        if self.signed_url_endpoint and not self.signed_url_seconds:
            return "SIGNED_URL_ENDPOINT needs SIGNED_URL_SECONDS: without it URLs are not signed"
        return ""

    @field_validator("bucket_path")
    @classmethod
    def _path_is_clean(cls, value: str) -> str:
        segments = value.strip("/").split("/")
        if value.strip("/") and (not all(segments) or {".", ".."} & set(segments) or not value.isprintable()):
            raise ValueError("has an empty part, '.' or '..', or is not printable")
        return value
