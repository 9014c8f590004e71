"""Addresses that open a picture for a while: signed with a secret of this server. Knows no HTTP."""

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
    """What this server alone knows. Without a `value` one is made and kept in `file`, so that it outlives restarts.

    Servers that are to honour one another's addresses, and name pictures alike, share a value.
    """

    def __init__(self, value: str, file: Path) -> None:
        self._value = value.encode()
        self._file = file

    def open(self) -> None:
        """Read the secret, or make it; of several processes that make it, all use the first one's.

        One that is damaged is put aside for a new one: addresses that were signed with it open nothing any more.
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
        """The secret. Raises `StorageUnavailable` until opened."""
        if not self._value:
            raise StorageUnavailable("The secret of signed addresses is not there yet.", retry_after=5)
        return self._value

    def hmac_hex(self, text: str) -> str:
        """HMAC-SHA256 of a text, 64 hexadecimal digits. Raises `StorageUnavailable` until opened."""
        return hmac.new(self.value, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def _fault(self) -> str:
        """What is wrong with the file, in a few words; empty where nothing is."""
        try:
            return "" if len(self._file.read_bytes()) >= _SECRET_BYTES else "it is cut short"
        except OSError as error:  # a folder, a link to nothing, another user's
            return str(error.strerror)


class UrlSigner:
    """Signs keys for `seconds`, with the secret of a server; see `ServerSecret`."""

    def __init__(self, secret: str, file: Path, seconds: int, now: Callable[[], float] = time.time) -> None:
        self._secret = ServerSecret(secret, file)
        self._seconds = seconds
        self._now = now

    def open(self) -> None:
        """Read the secret, or make it. Raises `StorageUnavailable`."""
        self._secret.open()

    def query(self, key: str) -> str:
        """What is put behind an address of `key`. Raises `StorageUnavailable` until opened."""
        expires = int(self._now()) + self._seconds
        return f"expires={expires}&signature={self._signature(key, str(expires))}"

    def verify(self, key: str, expires: str, signature: str) -> int | None:
        """Until when (seconds since 1970) an address holds; `None` for one that does not."""
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            return None
        try:
            right = self._signature(key, expires)
        except StorageUnavailable:
            return None
        # Compared as bytes: text that is not ASCII cannot be.
        same = hmac.compare_digest(right.encode(), signature.encode("utf-8", "replace"))
        return int(expires) if same and self._now() < int(expires) else None

    def _signature(self, key: str, expires: str) -> str:
        return self._secret.hmac_hex(f"{expires}\n{key}")
