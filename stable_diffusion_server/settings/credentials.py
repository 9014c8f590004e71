"""Settings of Content Credentials, the signed statement in each image of how it was made (C2PA)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from stable_diffusion_server.settings.base import SettingsGroup, none_if_empty


def _refuse_modules(value: object) -> object:
    """Refuse the URI of a key in a hardware module (RFC 7512), which would be read as the name of a file."""
    if str(value).lower().startswith("pkcs11:"):
        raise ValueError("is a PKCS#11 URI, which is not supported: give a PEM file")
    return none_if_empty(value)


_PemFile = Annotated[Path | None, BeforeValidator(_refuse_modules)]


class CredentialsSettings(SettingsGroup):
    """Whether images are signed, and with which certificate."""

    content_credentials: Literal["", "on", "off"] = Field(
        "",
        description=(
            "`on`: each image is signed with Content Credentials (C2PA). Empty: `on` where `c2pa-python` is "
            "installed, as by `make run`. `off`, and EMBED_METADATA=none: images are not signed."
        ),
    )
    credentials_certificate: _PemFile = Field(
        None,
        description=(
            "PEM file of the certificate that signs, followed by those that issued it; servers whose images count as "
            "each other's need the same. Empty: one is made in DATA_DIR."
        ),
    )
    credentials_key: _PemFile = Field(
        None, description="PEM file of the certificate's private key, without a password. Not a PKCS#11 URI."
    )

    @field_validator("content_credentials")
    @classmethod
    def _is_installed(cls, value: str) -> str:
        if value == "on" and find_spec("c2pa") is None:
            raise ValueError("needs c2pa-python (credentials-requirements.txt), which is not installed")
        return value

    def credentials_fault(self) -> str:
        """Return a sentence about settings that do not fit together; empty if they do."""
        if (self.credentials_certificate is None) != (self.credentials_key is None):
            return "CREDENTIALS_CERTIFICATE and CREDENTIALS_KEY are given together, or neither"
        return ""
