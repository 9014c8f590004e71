"""Bodies of requests to the UI, read within bounds of bytes and seconds."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from stable_diffusion_server.errors import MalformedRequest, TooLarge

SECONDS = 60.0


async def read_body(receive: Receive, limit: int, seconds: float = SECONDS) -> bytes:
    """The body of a request.

    Raises `TooLarge` beyond `limit` bytes, `MalformedRequest` where it is late or breaks off.
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
