"""Who asks: a key, the operator of a local server, or a stranger at an address. A frozen value; no policy."""

from __future__ import annotations

from dataclasses import dataclass

# No key has a name with a blank.
_ANONYMOUS = "anonymous "


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `name` is that of the API key, empty where none is needed.

    `prefix` is the only part of the bucket's names it may write, overwrite, delete or list; empty: all.
    `admin` marks a key that may read and change what belongs to others. `anonymous` marks a client without a key
    under ALLOW_ANONYMOUS, who is a stranger to every other one. `address` is the client's, or its IPv6 /64 network.
    """

    name: str = ""
    prefix: str = ""
    admin: bool = False
    anonymous: bool = False
    address: str = ""

    @property
    def has_full_access(self) -> bool:
        """Whether it may read and change what belongs to others: an admin key, or the operator of a local server."""
        return self.admin or not (self.name or self.anonymous)

    def may_access_jobs_of(self, owner: Caller) -> bool:
        """Whether it may see and cancel the jobs of `owner`, whose ids it knows.

        An anonymous client is known by nothing else: the id, which this server made, is all that tells whose a job is.
        """
        return self.has_full_access or owner.anonymous or owner.owner == self.owner

    @property
    def share(self) -> str:
        """The name under which limited capacity is shared out among callers: its key's, else its address's."""
        return f"key {self.name}" if self.name else f"address {self.address}"

    @property
    def owner(self) -> str:
        """The name under which jobs, idempotency keys and choices are kept: no two strangers have the same.

        A key's own name, empty for the operator, and the address of an anonymous client, which no key can be named.
        """
        return f"{_ANONYMOUS}{self.address}" if self.anonymous else self.name

    @classmethod
    def from_owner(cls, owner: str, prefix: str = "") -> Caller:
        """The caller whose `owner` was written down; whether it is admin is for the keys of today to say."""
        if owner.startswith(_ANONYMOUS):
            return cls(anonymous=True, address=owner.removeprefix(_ANONYMOUS))
        return cls(owner, prefix)
