"""Headers that keep browsers from doing with an answer what it is not meant for."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import Message

_ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# An answer that is no page loads nothing, stands in no frame, and is not kept: it may hold what a key paid for.
_UNLESS_SAID = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def protect(message: Message, path: str) -> None:
    """Add the headers to the start of an answer. Pictures may be shown elsewhere; the pages of the UI say their own."""
    headers = MutableHeaders(scope=message)
    for name, value in _ALWAYS.items():
        headers[name] = value
    headers.setdefault("Cross-Origin-Resource-Policy", "cross-origin" if path.startswith("/files/") else "same-origin")
    if not path.startswith("/ui"):
        for name, value in _UNLESS_SAID.items():
            headers.setdefault(name, value)
