"""Where pictures are kept, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from stable_diffusion_server.settings.base import SettingsGroup


class StorageSettings(SettingsGroup):
    """Buckets, their keys, and the folder of the server's own state."""

    storage_provider: Literal["local", "r2", "s3", "gcs"] = Field(
        "local",
        description="Where pictures are stored: `local`, a folder; `r2`, `s3` (AWS and any S3) or `gcs`, a bucket.",
    )
    bucket_name: str = Field("", description="Name of the bucket; needed for `r2`, `s3` and `gcs`.")
    bucket_path: str = Field("static/uploads", description="Put before every name in the bucket. May be empty.")
    local_bucket_dir: Path = Field(Path("bucket"), description="Folder of the local bucket.")
    r2_endpoint_url: str = Field(
        "", description="Address of the S3 interface; needed for `r2`, and for an `s3` that is not AWS."
    )
    google_application_credentials: Path | None = Field(
        None, description="Key file of a Google service account. Empty: Google's own chain."
    )
    aws_access_key_id: SecretStr = Field(
        SecretStr(""), description="Key for `r2` and `s3`. Empty: AWS's own chain (environment, profile, role)."
    )
    aws_secret_access_key: SecretStr = Field(SecretStr(""), description="The secret that belongs to the key.")
    aws_session_token: SecretStr = Field(SecretStr(""), description="The token of a key that is lent for a while.")
    bucket_acl: str = Field(
        "",
        pattern=r"^(|private|public-read|bucket-owner-full-control)$",
        description="Canned ACL sent with each object of `s3`, such as `public-read`. Empty: none, as R2 needs it.",
    )
    signed_url_seconds: int = Field(
        0, ge=0, le=604_800, description="For private buckets: answers hold URLs signed for this long. 0: plain URLs."
    )
    url_secret: SecretStr = Field(
        SecretStr(""),
        description=(
            "Signs this server's own URLs and, with API_KEYS, makes the names of pictures and tells whose they are; "
            "servers on one bucket share it. Empty: one in DATA_DIR."
        ),
    )
    storage_timeout: float = Field(
        10.0, gt=0, le=300, allow_inf_nan=False, description="Seconds to wait for the bucket before going on without."
    )
    spool_bytes: int = Field(
        1_073_741_824, ge=0, description="Most bytes of pictures kept in DATA_DIR while the bucket does not take them."
    )
    existence_cache_size: int = Field(
        100_000, ge=0, description="Most keys remembered as stored; 0 asks the bucket each time."
    )
    existence_cache_ttl: float = Field(
        300.0, ge=0, allow_inf_nan=False, description="Seconds a key is remembered, if deleted by others meanwhile."
    )
    history_entries: int = Field(
        100_000, ge=0, le=10_000_000, description="Most pictures kept in the history, in DATA_DIR; 0 keeps none."
    )
    history_days: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Days after which the history forgets a picture; 0: never."
    )
    data_dir: Path = Field(Path("data"), description="Folder for the server's own state, `progress.txt` among it.")
    embed_metadata: Literal["full", "digest", "none"] = Field(
        "full",
        description=(
            "What the picture file holds about how it was made: `full`, all of it; `digest`, one number; both with "
            "IPTC's mark of generated pictures in XMP. `none`: nothing, and no mark."
        ),
    )

    @field_validator("r2_endpoint_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError("is not an http or https address")
        if "@" in parts.netloc:
            raise ValueError("must not hold credentials")
        return value.rstrip("/")

    @field_validator("google_application_credentials", mode="before")
    @classmethod
    def _no_file_if_empty(cls, value: Any) -> Any:
        return value or None

    @field_validator("bucket_path")
    @classmethod
    def _path_is_clean(cls, value: str) -> str:
        segments = value.strip("/").split("/")
        if value.strip("/") and (not all(segments) or {".", ".."} & set(segments) or not value.isprintable()):
            raise ValueError("has an empty part, '.' or '..', or is not printable")
        return value
