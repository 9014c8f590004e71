"""Who a visitor is: the server by the address they used, the key they have shown, a name for what is theirs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import httpx
from starlette.requests import Request

from stable_diffusion_server.concurrency import FairRequestQueue
from stable_diffusion_server.ui.client import ApiClient, ServerAddress
from stable_diffusion_server.ui.sessions import SessionStore
from stable_diffusion_server.ui.work_queue import visitor_queue

COOKIE = "studio"


@dataclass(frozen=True, slots=True)
class ApiClients:
    """Desks over one client. With `base`, they are all at that server, with that `key`, whoever visits."""

    http: httpx.AsyncClient
    guests: SessionStore = field(default_factory=SessionStore)
    base: str = ""
    key: str = field(default="", repr=False)
    turns: FairRequestQueue = field(default_factory=visitor_queue)

    def at(self, base: str, key: str, client: ServerAddress) -> ApiClient:
        """The desk for a key."""
        return ApiClient(self.http, self.base or base.rstrip("/"), self.key or key, client, self.turns)

    def of(self, request: Request) -> ApiClient:
        """The desk of a visitor."""
        key = self.guests.key_of(request.cookies.get(COOKIE, "")) or ""
        return self.at(f"{request.url.scheme}://{request.headers.get('host', '')}", key, client_of(request))

    def owner_of(self, request: Request) -> str:
        """The name under which a visitor's uploads and sessions are kept, and shares of what is limited given out."""
        caller = request.scope.get("state", {}).get("caller")
        if caller is not None and (caller.name or caller.address):
            return str(caller.share)
        key = self.guests.key_of(request.cookies.get(COOKIE, ""))
        return f"key {hashlib.sha256(key.encode()).hexdigest()}" if key else f"address {client_of(request).address}"


def client_of(request: Request) -> ServerAddress:
    """The connection a request came by."""
    address = request.client.host if request.client else ""
    return ServerAddress(address, bool(request.scope.get("state", {}).get("forwarded")))
