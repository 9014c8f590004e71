"""Ownership of stored images by API key, and object keys that reveal no request to other callers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.types import Caller, GenerationRequest, StoredObject

_OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Ownership:
    """Decides which caller owns an image. `keyed` is an HMAC with the server's secret; `None` without API keys.

    `folder` holds all images. With `private`, image URLs are signed. An object's record holds the owner as an HMAC, so
    that a public bucket reveals no names of API keys.
    """

    keyed: Callable[[str], str] | None = None
    folder: str = ""
    private: bool = False

    def conceal(self, digest: str, request: GenerationRequest) -> str:
        """Return the digest to use in an object key: with API keys, an HMAC that differs per API key.

        Equal requests of two API keys get different object keys, so neither caller learns about the other's request.
        """
        return digest if self.keyed is None else self.keyed(f"name\n{request.named_for}\n{digest}")

    def owner_record(self, caller: Caller) -> dict[str, str]:
        """Return the owner entry of an object's record; empty without API keys."""
        return {_OWNER: self._mark(caller)} if self.keyed is not None and caller.name else {}

    def owns(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller owns an image: its API key made it, or the object key is under the API key's prefix."""
        if caller.prefix and stored.key.startswith(self.folder + caller.prefix):
            return True
        return self.keyed is not None and bool(caller.name) and stored.record.get(_OWNER) == self._mark(caller)

    def may_know(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller may learn that an image was stored before its request. Always true without API keys."""
        return self.keyed is None or caller.has_full_access or self.owns(caller, stored)

    def visible_record(self, caller: Caller, stored: StoredObject, *, named: bool) -> bool:
        """`may_know` for the result of a request; `named`: the request chose the object key.

        Raises `Forbidden` if the result would give a private image to another API key that guessed its object key.
        """
        may_know = self.may_know(caller, stored)
        if self.private and named and not may_know:
            raise Forbidden("Another key has taken this name.", field="save_path")
        return may_know

    def check_overwrite(self, caller: Caller, stored: StoredObject | None) -> None:
        """Raise `Forbidden` for an image the caller must not overwrite."""
        if stored is not None and not (caller.has_full_access or self.owns(caller, stored)):
            raise Forbidden("The picture of this name was made by another key.", field="save_path")

    def _mark(self, caller: Caller) -> str:
        return self.keyed(f"owner\n{caller.name}")[:32] if self.keyed is not None else ""
