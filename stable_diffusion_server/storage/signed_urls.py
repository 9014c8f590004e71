"""Signs and verifies expiring image URLs with the server's secret (HMAC-SHA256)."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from stable_diffusion_server.errors import StorageUnavailable
from stable_diffusion_server.files import quarantine

_SECRET_BYTES = 32


class ServerSecret:
    """The server's secret. Without a `value`, `open` generates 32 random bytes and stores them in `file`.

    Servers that share a bucket need the same value, to accept each other's URLs and derive the same object keys.
    """

    def __init__(self, value: str, file: Path) -> None:
        self._value = value.encode()
        self._file = file

    def open(self) -> None:
        """Read the secret or generate it; of several processes that generate it, the first wins.

        Quarantines and replaces a damaged file, which invalidates all earlier signatures. Raises `StorageUnavailable`.
        """
        if self._value:
            return
        try:
            if (self._file.exists() or self._file.is_symlink()) and (fault := self._fault()):
                quarantine(self._file, fault)
            if not self._file.exists():
                part = self._file.with_suffix(f".{uuid4().hex}.part")
                with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(_SECRET_BYTES))
                try:
                    os.link(part, self._file)
                except FileExistsError:
                    pass  # another process was first
                finally:
                    part.unlink()
            secret = self._file.read_bytes()
        except OSError as error:
            raise StorageUnavailable(
                f"DATA_DIR cannot keep the secret of signed addresses ({error.strerror})."
            ) from error
        self._value = secret

    @property
    def value(self) -> bytes:
        """The secret. Raises `StorageUnavailable` before `open`."""
        if not self._value:
            raise StorageUnavailable("The secret of signed addresses is not there yet.", retry_after=5)
        return self._value

    def hmac_hex(self, text: str) -> str:
        """Return the HMAC-SHA256 of a text, 64 hexadecimal digits. Raises `StorageUnavailable` before `open`."""
        return hmac.new(self.value, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _fault(self) -> str:
        """Return why the file is unusable; empty if it is usable."""
        try:
            return "" if len(self._file.read_bytes()) >= _SECRET_BYTES else "it is cut short"
        except OSError as error:  # a folder, a dangling link, no permission
            return str(error.strerror)


class UrlSigner:
    """Signs object keys for `seconds` with a `ServerSecret`."""

    def __init__(self, secret: str, file: Path, seconds: int, now: Callable[[], float] = time.time) -> None:
        self._secret = ServerSecret(secret, file)
        self._seconds = seconds
        self._now = now

    def open(self) -> None:
        """Read or generate the secret. Raises `StorageUnavailable`."""
        self._secret.open()

    def query(self, key: str) -> str:
        """Return the query string for the URL of `key`. Raises `StorageUnavailable` before `open`."""
        expires = int(self._now()) + self._seconds
        return f"expires={expires}&signature={self._signature(key, str(expires))}"

    def verify(self, key: str, expires: str, signature: str) -> int | None:
        """Return the expiry (seconds since 1970) of a valid signature; `None` if it is invalid or expired."""
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            return None
        try:
            right = self._signature(key, expires)
        except StorageUnavailable:
            return None
        # As bytes: compare_digest rejects non-ASCII str.
        same = hmac.compare_digest(right.encode(), signature.encode("utf-8", "replace"))
        return int(expires) if same and self._now() < int(expires) else None

    def _signature(self, key: str, expires: str) -> str:
        return self._secret.hmac_hex(f"{expires}\n{key}")
