"""What is asked of the bucket behind the spool, by rooms that are strangers to `bucket_api`, which promises it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from stable_diffusion_server.types import StoredObject


class Store(Protocol):
    """The bucket behind, as far as it is needed here."""

    def open(self) -> None:
        """Make ready."""

    def close(self) -> None:
        """Let go."""

    def stat(self, key: str) -> StoredObject | None:
        """The object or `None`."""

    def create(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> tuple[StoredObject, bool]:
        """Store if absent."""

    def overwrite(self, key: str, data: bytes, content_type: str, record: Mapping[str, str]) -> StoredObject:
        """Store."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes."""

    def delete(self, key: str) -> None:
        """Remove."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys."""

    def url(self, key: str) -> str | None:
        """Address."""
