"""Where the server listens, and who may come in."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from stable_diffusion_server.settings.kinds import Group, Keys, Names


class Doors(Group):
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
    api_keys: Keys = Field((), description="Keys, separated by commas, of which drawing needs one. Empty: no key.")
    allow_anonymous: bool = Field(False, description="1 lets clients that are not on this machine draw without a key.")

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
