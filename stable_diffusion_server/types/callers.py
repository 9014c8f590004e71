"""The caller of a request: what it may access, and whom its requests count for."""

from __future__ import annotations

from dataclasses import dataclass

# Ends with a space, which no key name contains.
_ANONYMOUS = "anonymous "


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request.

    Attributes:
        name: Name of the API key; empty if no key is required.
        prefix: Object keys that the caller may write, delete and list start with this; empty for all.
        admin: Whether the API key may read and change what belongs to others.
        anonymous: Whether this is a client without a key under ALLOW_ANONYMOUS.
        address: The client's IPv4 address, or its IPv6 /64 network.
        models: Names of the models that the API key may use; empty for all.
    """

    name: str = ""
    prefix: str = ""
    admin: bool = False
    anonymous: bool = False
    address: str = ""
    models: tuple[str, ...] = ()

    @property
    def uses_all_models(self) -> bool:
        """Whether the caller may use every model."""
        return not self.models or self.has_full_access

    @property
    def has_full_access(self) -> bool:
        """Whether the caller may read and change everything: an admin key, or the operator of a local server."""
        return self.admin or not (self.name or self.anonymous)

    def may_access_jobs_of(self, owner: Caller) -> bool:
        """Whether the caller may see and cancel those jobs of `owner` whose ids it knows.

        Anyone who knows the id may access an anonymous client's job, because such clients have no other credential.
        """
        return self.has_full_access or owner.anonymous or owner.owner == self.owner

    @property
    def share(self) -> str:
        """Identifies the caller where capacity is shared fairly: by API key, or by address without one."""
        return f"key {self.name}" if self.name else f"address {self.address}"

    @property
    def owner(self) -> str:
        """Identifies the owner of jobs, idempotency keys and options: the key name, or an anonymous client's address.

        It is empty for the operator, and no key name equals an anonymous client's owner string.
        """
        return f"{_ANONYMOUS}{self.address}" if self.anonymous else self.name

    @classmethod
    def from_owner(cls, owner: str, prefix: str = "") -> Caller:
        """The caller with this stored `owner`; `admin` is false, since it depends on the current keys."""
        if owner.startswith(_ANONYMOUS):
            return cls(anonymous=True, address=owner.removeprefix(_ANONYMOUS))
        return cls(owner, prefix)
