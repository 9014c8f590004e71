"""Reads request bodies within limits, and writes errors as problem+json (RFC 9457), for the UI's own routes."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import Receive

from stable_diffusion_server.errors import MalformedRequest, ServerError, TooLarge

SECONDS = 60.0


async def read_body(receive: Receive, limit: int, seconds: float = SECONDS) -> bytes:
    """Return the body of a request.

    Raises `TooLarge` beyond `limit` bytes, `MalformedRequest` if it is incomplete after `seconds` or at a disconnect.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise MalformedRequest("The request broke off.")
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise TooLarge(f"A body may have {limit} bytes here.")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise MalformedRequest(f"The body did not arrive within {seconds:g} s.") from error


def problem_response(error: ServerError) -> JSONResponse:
    """Return the response for an error."""
    body: dict[str, object] = {
        "type": f"urn:stable-diffusion-server:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.field:
        body |= {"field": error.field, "errors": [{"field": name, "detail": text} for name, text in error.faults]}
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(body, error.status, headers, media_type="application/problem+json")
