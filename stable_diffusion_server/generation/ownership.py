"""Whose a stored picture is, and names of pictures that tell strangers nothing. Pure but for the secret handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.types import Caller, GenerationRequest, StoredObject

_OWNER = "owner"


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose pictures are. `keyed` is a hash by a secret of this server, `None` where no keys are set.

    `folder` is where all pictures are; `private` tells that their addresses are signed, so that none is anyone's. An
    object's record says whose it is by a hash that only this server can make: a public bucket tells no names of keys.
    """

    keyed: Callable[[str], str] | None = None
    folder: str = ""
    private: bool = False

    def conceal(self, digest: str, order: GenerationRequest) -> str:
        """The digest that names a picture: with keys, one that only this server can make, and another for each key.

        Two keys' equal orders have different names: what one of them finds stored was drawn for itself.
        """
        return digest if self.keyed is None else self.keyed(f"name\n{order.named_for}\n{digest}")

    def owner_record(self, caller: Caller) -> dict[str, str]:
        """What an object's record says of whose it is; nothing where there are no keys."""
        return {_OWNER: self._mark(caller)} if self.keyed is not None and caller.name else {}

    def owns(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether a picture is the caller's own: made by its key, or in the folder that is that key's alone."""
        if caller.prefix and stored.key.startswith(self.folder + caller.prefix):
            return True
        return self.keyed is not None and bool(caller.name) and stored.record.get(_OWNER) == self._mark(caller)

    def may_know(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller may be told that a picture was there before it asked. Without keys names are no secret."""
        return self.keyed is None or caller.has_full_access or self.owns(caller, stored)

    def visible_record(self, caller: Caller, stored: StoredObject, *, named: bool) -> bool:
        """The same for what is answered to an order, which gave the name itself if `named`.

        Raises `Forbidden` where the answer would open a private picture to another key that knows its name.
        """
        may_know = self.may_know(caller, stored)
        if self.private and named and not may_know:
            raise Forbidden("Another key has taken this name.", field="save_path")
        return may_know

    def check_overwrite(self, caller: Caller, stored: StoredObject | None) -> None:
        """Raise `Forbidden` for a picture the caller must not write over."""
        if stored is not None and not (caller.has_full_access or self.owns(caller, stored)):
            raise Forbidden("The picture of this name was made by another key.", field="save_path")

    def _mark(self, caller: Caller) -> str:
        return self.keyed(f"owner\n{caller.name}")[:32] if self.keyed is not None else ""
