"""Where the server listens, and who may come in."""

from __future__ import annotations

import re
from importlib.util import find_spec
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from stable_diffusion_server.settings.api_keys import ApiKey, is_rate, parse_keys
from stable_diffusion_server.settings.base import Keys, Names, SettingsGroup


class HttpSettings(SettingsGroup):
    """Addresses, origins and keys."""

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
    allow_same_site: bool = Field(
        False,
        description="1 lets pages of other ports and subdomains of this server's site draw, which may be anyone's.",
    )
    api_keys: Keys = Field(
        (),
        description=(
            "Keys, separated by commas, of which drawing needs one: the secret alone, or "
            "`name:secret;rate=60/minute;concurrency=4;prefix=team-a/;admin`. A sole key is admin; of several, those "
            "marked may list, read and delete what others made. Empty: no key."
        ),
    )
    api_keys_file: Path | None = Field(
        None, description="File of further keys, one to a line, written as in API_KEYS; `#` begins a remark."
    )
    allow_anonymous: bool = Field(
        False,
        description="1 lets anyone draw without a key, as a stranger to all others: docs/security.md tells more.",
    )
    rate_limit: str = Field(
        "",
        description=(
            "Requests for pictures by one key, or one address where no key is needed, as in `60/minute`. Empty: any."
        ),
    )
    concurrency_limit: int = Field(0, ge=0, description="Requests for pictures at a time, counted the same; 0: any.")
    trusted_proxies: Names = Field(
        (),
        description=(
            "Addresses and networks of proxies whose X-Forwarded-For, -Host and -Proto are believed, as in `10.0.0.2`."
        ),
    )
    log_prompts: bool = Field(False, description="1 writes the prompts of drawn pictures into the log; else none is.")
    otel_exporter_otlp_endpoint: str = Field(
        "",
        description=(
            "Address of an OpenTelemetry collector that takes traces over HTTP, as in `http://localhost:4318`; needs "
            "`tracing-requirements.txt`. Empty: no traces."
        ),
    )
    ui: bool = Field(True, description="0 leaves the UI out, which is at `/ui`.")
    ui_rate_limit: str = Field(
        "1200/minute",
        description="Events of the UI's pages by one visitor; those that draw count for RATE_LIMIT too. Empty: any.",
    )
    ui_uploads: int = Field(
        16, ge=2, description="Pictures sent to the UI that are kept of one visitor; the oldest goes first."
    )
    ui_upload_bytes: int = Field(
        100_663_296, ge=1024, description="Bytes of pictures sent to the UI that are kept of one visitor, in memory."
    )
    ui_upload_total_bytes: int = Field(
        268_435_456, ge=1024, description="The same of all visitors together; who keeps most loses the oldest first."
    )
    ui_upload_seconds: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a picture sent to the UI is kept after its last use.",
    )
    get_generates: bool = Field(True, description="0 has only POST draw.")
    max_n: int = Field(
        4, ge=1, le=64, description="Most pictures one request may ask for, where it may ask for several."
    )
    model_aliases: Names = Field(
        ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5"),
        description=(
            "Models by the names of other servers: `dall-e-3` is TEXT_TO_IMAGE_MODEL, `dall-e-3=flux` is Flux."
        ),
    )

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

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _can_be_traced_to(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError("is not an http or https address without credentials")
        if value and find_spec("opentelemetry.exporter") is None:
            raise ValueError("needs the packages of tracing-requirements.txt, which are not installed")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _names_are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", name):
                raise ValueError(f"{name!r} is not a host name such as draw.example.com")
        return value

    def read_keys(self) -> tuple[ApiKey, ...]:
        """The keys of API_KEYS and of API_KEYS_FILE. Raises `ValueError` naming the setting that is wrong."""
        return parse_keys([*(key.get_secret_value() for key in self.api_keys), *_lines(self.api_keys_file)])

    @field_validator("api_keys")
    @classmethod
    def _keys_are_right(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        parse_keys(key.get_secret_value() for key in value)
        return value

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _none_if_empty(cls, value: Any) -> Any:
        return value or None

    @field_validator("api_keys_file")
    @classmethod
    def _file_is_right(cls, value: Path | None) -> Path | None:
        parse_keys(_lines(value))
        return value

    @field_validator("rate_limit", "ui_rate_limit")
    @classmethod
    def _is_a_rate(cls, value: str) -> str:
        if value and not is_rate(value):
            raise ValueError(f"{value!r} is not a rate such as 60/minute")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                ip_network(entry)
            except ValueError:
                raise ValueError(f"{entry!r} is not an address or a network such as 10.0.0.0/8") from None
        return value

    @field_validator("model_aliases")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*(=(sdxl|flux))?", entry):
                raise ValueError(f"{entry!r} is not like dall-e-3 or dall-e-3=flux")
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


def _lines(file: Path | None) -> list[str]:
    """The lines of a file of keys that hold one."""
    if file is None:
        return []
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None
    return [line for line in lines if line]
