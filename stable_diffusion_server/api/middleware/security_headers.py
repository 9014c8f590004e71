"""Headers that keep browsers from doing with an answer what it is not meant for."""

from __future__ import annotations

from starlette.types import Message

_ALWAYS = {b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer"}
_RESOURCE = b"cross-origin-resource-policy"
# An answer that is no page loads nothing, stands in no frame, and is not kept: it may hold what a key paid for.
_UNLESS_SAID = {
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}


def add_security_headers(message: Message, path: str) -> None:
    """Add the headers to the start of an answer. Pictures may be shown elsewhere; the pages of the UI say their own."""
    # On the raw list, in one pass: every answer goes through here.
    headers = [pair for pair in message["headers"] if pair[0] not in _ALWAYS]
    said = {name for name, _ in headers}
    wanted = {**_ALWAYS, _RESOURCE: b"cross-origin" if path.startswith("/files/") else b"same-origin"}
    if not path.startswith("/ui"):
        wanted |= _UNLESS_SAID
    message["headers"] = headers + [pair for pair in wanted.items() if pair[0] not in said]
