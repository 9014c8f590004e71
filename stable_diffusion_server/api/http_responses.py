"""Responses of all routes: JSON that is always encodable, status 499 for closed connections, security headers."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from starlette import responses
from starlette.types import Message

from stable_diffusion_server.parsing import dumps

_ALWAYS = {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}
_RESOURCE = b"cross-origin-resource-policy"
# Responses except UI pages load no resources, cannot be framed, and are not cached: they may hold private images.
_DEFAULTS = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}


class JSONResponse(responses.JSONResponse):
    """JSON without lone surrogates and non-finite numbers, which records written by other software may contain."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return dumps(content).encode()


def client_closed_request() -> Response:
    """Return the response for a client that has disconnected: status 499, as in nginx."""
    return Response(status_code=499)


def add_security_headers(message: Message, path: str) -> None:
    """Add the headers to the start of a response. Images may be embedded elsewhere; UI pages set their own policy."""
    # Edits the raw list in one pass, because every response passes here.
    headers = [pair for pair in message["headers"] if pair[0] not in _ALWAYS]
    present = {name for name, _ in headers}
    wanted = {**_ALWAYS, _RESOURCE: b"cross-origin" if path.startswith("/files/") else b"same-origin"}
    if not path.startswith("/ui"):
        wanted |= _DEFAULTS
    message["headers"] = headers + [pair for pair in wanted.items() if pair[0] not in present]
