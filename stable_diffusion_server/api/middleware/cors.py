"""Cross-origin resource sharing: lets pages of the listed origins send requests, and read the responses."""

from __future__ import annotations

import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
_MAX_AGE_SECONDS = 600
# What a preflight request may ask for: names of headers (RFC 9110, 5.1), in 4 KiB. Clients send up to some 20 names.
_HEADERS_MAX_BYTES = 4096
# Not `*`, which would mean all of them.
_HEADER_NAMES = re.compile(r"[!#$%&'+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'+.^_`|~0-9A-Za-z-]+)*")
# What scripts of a page may read of a response, beside the headers that every script may read.
_EXPOSED = ", ".join(
    (
        "X-Request-ID",
        "Retry-After",
        "Location",
        "Content-Location",
        "X-Warnings",
        "Preference-Applied",
        "X-Job-ID",
        "Idempotency-Replayed",
        "RateLimit-Limit",
        "RateLimit-Remaining",
        "RateLimit-Reset",
        "RateLimit-Policy",
    )
)


class CrossOriginMiddleware:
    """ASGI middleware: answers preflight requests of `origins`, and adds the CORS headers to their responses.

    A preflight request gets the header names that it asks for, because clients have headers of their own, such as
    `x-stainless-os`. Origins are compared as text. Requests of all other origins pass without these headers, and the
    access policy refuses them. Cookies are never allowed, so neither is `*`.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.getlist("origin")
        origin = given[0] if len(given) == 1 and given[0] in self._origins else None
        if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight_response(origin, headers)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                answered = MutableHeaders(scope=message)
                # Also without an origin: a cache must not give that response to a page.
                answered.add_vary_header("Origin")
                if origin is not None:
                    answered["Access-Control-Allow-Origin"] = origin
                    answered["Access-Control-Expose-Headers"] = _EXPOSED
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _preflight_response(origin: str, headers: Headers) -> Response:
    """Return the response to a preflight request of a listed origin; 400 if it asks for what is no list of names."""
    answer = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Max-Age": str(_MAX_AGE_SECONDS),
        "Vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
    }
    asked = headers.getlist("access-control-request-headers")
    # A page of a public origin asks whether it may reach an address of a private network, such as 127.0.0.1.
    if headers.get("access-control-request-private-network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    if sum(map(len, asked)) > _HEADERS_MAX_BYTES:
        return PlainTextResponse(f"Names of headers may have {_HEADERS_MAX_BYTES} bytes.", 400, answer)
    names = ", ".join(filter(None, (part.strip() for part in asked)))
    if names and not _HEADER_NAMES.fullmatch(names):
        return PlainTextResponse("Access-Control-Request-Headers is no list of header names.", 400, answer)
    if names:
        answer["Access-Control-Allow-Headers"] = names
    return PlainTextResponse("OK", 200, answer)
