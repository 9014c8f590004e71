"""Which desk a visitor stands at: the server by the address they used, with the key they have shown. No requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from stable_diffusion_server.ui.desk import Desk
from stable_diffusion_server.ui.guests import Guests

COOKIE = "studio"


@dataclass(frozen=True, slots=True)
class Desks:
    """Desks over one client. With `base`, they are all at that server, with that `key`, whoever visits."""

    http: httpx.AsyncClient
    guests: Guests = field(default_factory=Guests)
    base: str = ""
    key: str = field(default="", repr=False)

    def at(self, base: str, key: str) -> Desk:
        """The desk for a key."""
        return Desk(self.http, self.base or base.rstrip("/"), self.key or key)

    def of(self, base: str, cookies: Mapping[str, str]) -> Desk:
        """The desk of a visitor."""
        return self.at(base, self.guests.key_of(cookies.get(COOKIE, "")) or "")
