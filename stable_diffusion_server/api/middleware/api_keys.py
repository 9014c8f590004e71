"""API keys: stored as hashes, compared in constant time."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from limits import RateLimitItem
from starlette.datastructures import Headers

from stable_diffusion_server.errors import Unauthorized
from stable_diffusion_server.types import Caller

# `api-key` is Azure's.
_KEY_HEADERS = ("x-api-key", "api-key")
_SCHEMES = ("basic", "bearer", "digest", "negotiate", "ntlm", "token")


@dataclass(frozen=True, slots=True)
class HashedApiKey:
    """An API key by the SHA-256 of its secret, with its limits: `concurrency` 0 and `rate` `None` mean no limit."""

    caller: Caller
    digest: bytes = field(repr=False)
    rate: RateLimitItem | None = None
    concurrency: int = 0


def hashed(secret: str) -> bytes:
    """Return the SHA-256 of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


class ApiKeyring:
    """The API keys of a server. Without keys, no caller needs one."""

    def __init__(self, keys: Iterable[HashedApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def holder(self, headers: Headers) -> HashedApiKey:
        """Return the API key of a request. Raises `Unauthorized`."""
        return self.of(_secret_of(headers))

    def of(self, secret: str) -> HashedApiKey:
        """Return the key of a secret. Raises `Unauthorized`."""
        given = hashed(secret)
        # Compares every key, so that the time is independent of which one matches.
        matching = [key for key in self._keys if hmac.compare_digest(given, key.digest)]
        if not matching:
            raise Unauthorized("Send a key as 'Authorization: Bearer …', 'X-API-Key: …' or 'api-key: …'.")
        return matching[0]


def holds_key(headers: Headers) -> bool:
    """Return whether a request has a key, right or wrong."""
    return any(name in headers for name in ("authorization", *_KEY_HEADERS))


def _secret_of(headers: Headers) -> str:
    """Return the secret of a request: bearer token, password of HTTP Basic with any name, bare key, or a key header.

    Replicate's earlier clients write `Token` for `Bearer`. The Authorization header comes first, unless it holds no
    secret.
    """
    shown = _authorized(headers.get("authorization", "").strip())
    return shown or next((headers[name] for name in _KEY_HEADERS if headers.get(name)), "")


def _authorized(header: str) -> str:
    """Return the secret in an Authorization header; empty if there is none."""
    scheme, _, token = header.partition(" ")
    match scheme.lower():
        case "bearer" | "token":
            return token.strip()
        case "basic":
            try:
                return base64.b64decode(token.strip(), validate=True).decode().partition(":")[2]
            except ValueError:
                return ""
        case _:
            # A key without a scheme, as some programs send it; a word and more is another scheme.
            return header if not token and scheme.lower() not in _SCHEMES else ""
