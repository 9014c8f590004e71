"""Settings of the HTTP server and the UI: address, public URL, origins, proxies, request bodies, login."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stable_diffusion_server.settings.auth import is_rate
from stable_diffusion_server.settings.base import Names, SettingsGroup

# Schemes of apps (`app://obsidian.md`, `tauri://localhost`) are compared as text, like the others.
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?P<port>:\d{1,5})?"
)
# Pages of these have the origin `null`, or no pages have them.
_NO_ORIGINS = ("file", "data", "blob", "about", "javascript", "ws", "wss", "ftp")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def _origin(text: str) -> str:
    """Return an origin as browsers send it. Raises `ValueError`."""
    if text == "null":
        return text
    if text == "*":
        raise ValueError("'*' would let every web site draw here: list the origins, such as https://app.example")
    if text.partition(":")[0] in _NO_ORIGINS:
        raise ValueError(f"{text!r} is not an origin: browsers send null for such pages")
    match = _ORIGIN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an origin such as https://app.example or app://obsidian.md, without a path")
    scheme, host, port = match["scheme"], match["host"], match["port"] or ""
    if scheme not in _DEFAULT_PORTS:
        return text
    return f"{scheme}://{host.lower()}{port if port != _DEFAULT_PORTS[scheme] else ''}"


class HttpSettings(SettingsGroup):
    """Where the server listens, and which HTTP requests it accepts."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    public_base_url: str = Field(
        "",
        description="Public base URL of the images, such as `https://images.example`. Empty: the URL of this server.",
    )
    allowed_hosts: Names = Field((), description="More host names this server answers to, separated by commas.")
    cors_origins: Names = Field(
        (),
        description=(
            "Origins of web pages and apps that may send requests, such as `https://app.example` or "
            "`app://obsidian.md`, separated by commas. `null` admits every local file and sandboxed frame."
        ),
    )
    allow_same_site: bool = Field(
        False,
        description=(
            "1 lets pages on other ports and subdomains of this server's site send requests; anyone may own those."
        ),
    )
    trusted_proxies: Names = Field(
        (),
        description=(
            "Addresses and networks of proxies whose X-Forwarded-For, -Host and -Proto are trusted, such as `10.0.0.2`."
        ),
    )
    get_generates: bool = Field(True, description="0 refuses GET requests that generate images; POST still does.")
    max_n: int = Field(10, ge=1, le=64, description="Maximum number of images per request, where a request has `n`.")
    model_aliases: Names = Field(
        ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2"),
        description=(
            "Model names of other servers, separated by commas: `dall-e-3` means TEXT_TO_IMAGE_MODEL, "
            "`dall-e-3=flux` means Flux. Listed at `/v1/models`. Other names that start with `gpt-image-`, "
            "`chatgpt-image-` or `dall-e-` also mean TEXT_TO_IMAGE_MODEL."
        ),
    )
    openai_response_format: Literal["auto", "url", "b64_json"] = Field(
        "auto",
        description=(
            "Response of the OpenAI endpoints to a request without `response_format`. `auto`: `b64_json` for models "
            "named `gpt-image-…` and `chatgpt-image-…` and for edits, `url` for others."
        ),
    )
    max_body_bytes: int = Field(1_048_576, ge=1024, description="Maximum size of a request body, except multipart.")
    max_upload_bytes: int = Field(33_554_432, ge=1024, description="Maximum size of a multipart body, files included.")
    body_timeout: float = Field(
        15.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds a body may send nothing, or wait for memory (BODIES_BYTES), before it is refused.",
    )
    body_min_rate: float = Field(
        16_384.0,
        ge=0,
        allow_inf_nan=False,
        description="Minimum bytes per second at which a body must arrive, measured over BODY_TIMEOUT.",
    )
    bodies_bytes: int = Field(
        268_435_456,
        ge=1_048_576,
        description=(
            "Maximum bytes of all bodies being received. One caller gets at most half, all anonymous callers together "
            "at most half; further bodies wait."
        ),
    )
    max_response_bytes: int = Field(
        67_108_864,
        ge=1024,
        description="Maximum size of a response with images as base64; larger ones have to ask for URLs.",
    )

    @field_validator("public_base_url")
    @classmethod
    def _is_base_url(cls, value: str) -> str:
        if not value:
            return ""
        url = value if "://" in value else f"https://{value}"
        parts = urlsplit(url)
        host = parts.netloc.rsplit(":", 1)[0] if parts.port else parts.netloc
        plain = re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]", host)
        if parts.scheme not in ("http", "https") or not plain or parts.query or parts.fragment or " " in url:
            raise ValueError("is not an http or https address")
        return url.rstrip("/")

    @field_validator("allowed_hosts")
    @classmethod
    def _are_host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d+)?", name):
                raise ValueError(f"{name!r} is not a host name such as draw.example.com")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_origin(text) for text in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                ip_network(entry)
            except ValueError:
                raise ValueError(f"{entry!r} is not an address or a network such as 10.0.0.0/8") from None
        return value

    @field_validator("model_aliases")
    @classmethod
    def _are_aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*(=[a-z0-9_-]+)?", entry):
                raise ValueError(f"{entry!r} is not like dall-e-3 or dall-e-3=flux")
        return value


class UiSettings(SettingsGroup):
    """Whether there is a web UI, and how much memory its uploads may take."""

    ui: bool = Field(True, description="0 disables the web UI at `/ui`.")
    ui_rate_limit: str = Field(
        "1200/minute",
        description=(
            "Maximum rate of UI events per visitor; events that generate images also count for RATE_LIMIT. "
            "Empty: unlimited."
        ),
    )
    ui_uploads: int = Field(
        16, ge=2, description="Maximum number of uploaded images kept per visitor; the oldest is dropped first."
    )
    ui_upload_bytes: int = Field(
        100_663_296, ge=1024, description="Maximum bytes of uploaded images kept in memory per visitor."
    )
    ui_upload_total_bytes: int = Field(
        268_435_456,
        ge=1024,
        description="The same for all visitors together; the visitor with the most bytes loses the oldest first.",
    )
    ui_upload_seconds: float = Field(
        3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds an uploaded image is kept after its last use.",
    )

    @field_validator("ui_rate_limit")
    @classmethod
    def _is_event_rate(cls, value: str) -> str:
        if value and not is_rate(value):
            raise ValueError(f"{value!r} is not a rate such as 60/minute")
        return value
