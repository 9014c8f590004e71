"""The settings: typed, with defaults and meanings, read from the environment once. The only reader of it."""

from __future__ import annotations

import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_ROOT = Path(__file__).resolve().parent.parent

Names = Annotated[tuple[str, ...], NoDecode]
Keys = Annotated[tuple[SecretStr, ...], NoDecode]


class SettingsError(Exception):
    """A setting is misspelt or invalid. The message is one sentence naming it, and never holds a secret value."""


class Settings(BaseSettings):
    """Every setting of the server. Names are those of environment variables, in any case; `.env` is read too."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, validate_default=True)

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_base_url: str = Field(
        "",
        description="Where pictures are reached from outside, as in `https://pictures.example`. Empty: this server.",
    )
    allowed_hosts: Names = Field((), description="Further names this server answers to, separated by commas.")
    cors_origins: Names = Field(
        (),
        description="Origins of web pages that may draw, as in `https://app.example`, separated by commas.",
    )
    api_keys: Keys = Field((), description="Keys, separated by commas, of which drawing needs one. Empty: no key.")
    allow_anonymous: bool = Field(False, description="1 lets clients that are not on this machine draw without a key.")

    models_dir: Path = Field(_ROOT / "models", description="Folder of the model weights.")
    text_to_image_model: Literal["flux", "sdxl"] = Field("sdxl", description="Model used when a request names none.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto`, `cpu`, `mps`, `cuda` or `cuda:1`.",
    )
    cpu_threads: int = Field(0, ge=0, le=1024, description="Threads for drawing on the CPU; 0 leaves it to PyTorch.")

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
    storage_timeout: float = Field(
        10.0, gt=0, le=300, allow_inf_nan=False, description="Seconds to wait for the bucket before going on without."
    )
    spool_bytes: int = Field(
        1_073_741_824, ge=0, description="Most bytes of pictures kept in DATA_DIR while the bucket does not take them."
    )
    known_keys: int = Field(100_000, ge=0, description="Most keys remembered as stored; 0 asks the bucket each time.")
    known_seconds: float = Field(
        300.0, ge=0, allow_inf_nan=False, description="Seconds a key is remembered, if deleted by others meanwhile."
    )
    data_dir: Path = Field(Path("data"), description="Folder for the server's own state, `progress.txt` among it.")
    embed_metadata: Literal["full", "digest", "none"] = Field(
        "full", description="What the picture file tells about how it was made."
    )

    queue_limit: int = Field(32, ge=1, description="Jobs that may wait; one more is answered 429.")
    max_batch: int = Field(4, ge=1, le=64, description="Jobs that share a forward pass at the most.")
    min_side: int = Field(64, ge=8, description="Smallest width and height in pixels.")
    max_side: int = Field(2048, ge=64, le=16383, description="Largest width and height in pixels.")
    max_steps: int = Field(100, ge=1, le=1000, description="Most denoising steps.")
    max_guidance: float = Field(20.0, ge=0, allow_inf_nan=False, description="Largest guidance scale.")
    max_prompt_characters: int = Field(4000, ge=1, le=10_000, description="Longest prompt in characters.")
    max_timeout: float = Field(
        600.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest `timeout` in seconds, and the one of a request without.",
    )
    max_body_bytes: int = Field(1_048_576, ge=1024, description="Largest request body in bytes, but for multipart.")
    max_upload_bytes: int = Field(33_554_432, ge=1024, description="Largest multipart body, files and all, in bytes.")
    max_image_bytes: int = Field(20_971_520, ge=1024, description="Largest picture file sent or fetched, in bytes.")
    max_image_pixels: int = Field(16_777_216, ge=4096, description="Largest area of a picture taken, in pixels.")
    max_image_side: int = Field(
        16_383, ge=64, le=16_383, description="Largest width and height of a picture taken; WebP holds no more."
    )
    decode_processes: int = Field(2, ge=1, le=64, description="Processes that decode pictures, each one at a time.")
    decode_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds to decode a picture at the most."
    )
    fetch_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds to fetch a picture by its URL at the most."
    )
    fetch_allow: Names = Field(
        (),
        description=(
            "Hosts and networks pictures may be fetched from although they are not public, separated by commas, "
            "with a port where it is not that of http or https: `images.internal`, `10.0.0.0/8`, `127.0.0.1:9000`."
        ),
    )
    bumpy_redraws: Literal["auto", "0", "1", "2"] = Field(
        "auto", description="How often a picture that is too bumpy is drawn again; `auto`: as suits the model."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`console` for people, `json` for machines; `auto`: people at a terminal."
    )

    @field_validator("allowed_hosts", "cors_origins", "api_keys", "fetch_allow", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("public_base_url")
    @classmethod
    def _with_scheme(cls, value: str) -> str:
        if not value:
            return ""
        url = value if "://" in value else f"https://{value}"
        parts = urlsplit(url)
        plain = re.fullmatch(
            r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]", parts.netloc.rsplit(":", 1)[0] if parts.port else parts.netloc
        )
        if parts.scheme not in ("http", "https") or not plain or parts.query or parts.fragment or " " in url:
            raise ValueError("is not an http or https address")
        return url.rstrip("/")

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
    def _none_if_empty(cls, value: Any) -> Any:
        return value or None

    @field_validator("allowed_hosts")
    @classmethod
    def _names_are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", name):
                raise ValueError(f"{name!r} is not a host name such as draw.example.com")
        return value

    @field_validator("api_keys")
    @classmethod
    def _keys_fit_a_header(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(re.fullmatch(r"[!-~]+", key.get_secret_value()) for key in value):
            raise ValueError("holds a key with blanks or characters beyond ASCII, which no header can carry")
        return value

    @field_validator("bucket_path")
    @classmethod
    def _path_is_clean(cls, value: str) -> str:
        segments = value.strip("/").split("/")
        if value.strip("/") and (not all(segments) or {".", ".."} & set(segments) or not value.isprintable()):
            raise ValueError("has an empty part, '.' or '..', or is not printable")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_are_exact(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is not an origin such as https://app.example")
        return value

    @field_validator("fetch_allow")
    @classmethod
    def _hosts_or_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not _is_host_or_network(entry):
                raise ValueError(f"{entry!r} is not a host or a network, such as 10.0.0.0/8 or 127.0.0.1:9000")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        bucket, data = self.local_bucket_dir.resolve(), self.data_dir.resolve()
        if bucket == data or bucket in data.parents or data in bucket.parents:
            raise ValueError("LOCAL_BUCKET_DIR and DATA_DIR must not contain one another")
        if self.storage_provider != "local" and not self.bucket_name:
            raise ValueError(f"BUCKET_NAME is needed with STORAGE_PROVIDER={self.storage_provider}")
        if self.storage_provider == "r2" and not self.r2_endpoint_url:
            raise ValueError("R2_ENDPOINT_URL is needed with STORAGE_PROVIDER=r2")
        if self.min_side > self.max_side:
            raise ValueError("MIN_SIDE is larger than MAX_SIDE")
        return self


def read_settings() -> Settings:
    """The settings from the environment and `.env`. Raises `SettingsError` with one sentence for the first fault."""
    known = set(Settings.model_fields)
    for name in {**os.environ, **dotenv_values(".env")}:
        if (meant := _misspelt(name.lower(), known)) is not None:
            raise SettingsError(f"{name} is not a setting; {meant.upper()} may be meant (unset or rename it).")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        # from None: the chained error would show the values, and one of them may be a key.
        raise SettingsError(f"{name} {message}.".strip()) from None


def describe_settings() -> str:
    """The settings as a Markdown table: name, default, meaning."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = None if field.default == SecretStr("") else field.default
        if isinstance(default, Path) and default.is_relative_to(_ROOT):
            default = default.relative_to(_ROOT)
        shown = (
            {"": "(empty)", (): "(empty)", None: "(empty)", True: "1", False: "0"}.get(default, default)
            if (_plain(default))
            else default
        )
        rows.append(f"| `{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def _is_host_or_network(entry: str) -> bool:
    try:
        ip_network(entry)
    except ValueError:
        pass  # not a bare network, so a host, perhaps with a port
    else:
        return True
    try:
        parts = urlsplit(f"//{entry}")
        return bool(parts.hostname) and parts.netloc == entry and "@" not in entry and parts.port != 0
    except ValueError:
        return False


def _plain(default: object) -> bool:
    return default is None or isinstance(default, str | tuple | bool)


def _misspelt(name: str, known: set[str]) -> str | None:
    """The setting that `name` is one typing error away from, when it is none itself. Short names are let be."""
    if name in known:
        return None
    return next((setting for setting in sorted(known) if len(setting) > 6 and _one_slip(name, setting)), None)


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less, other, or two swapped turn `a` into `b`."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    return (
        rest_a[1:] == rest_b[1:]
        or rest_a == rest_b[1:]
        or rest_a[1:] == rest_b
        or (rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:])
    )
