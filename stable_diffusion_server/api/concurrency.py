"""What becomes of work whose client goes away: it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from stable_diffusion_server.errors import NotReady

T = TypeVar("T")


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or `None` when the client went away first, which cancels it. Read the body before."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnection(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        await watching  # a body that is too long is told here; its end is the client's
        return None
    except asyncio.CancelledError:
        # The server program ends the calls that outlast its grace; the caller should hear why.
        raise NotReady("The server is going down.", retry_after=5) from None
    finally:
        working.cancel()
        watching.cancel()


async def disconnection(request: Request) -> None:
    """Wait for the client to go away. Read the body before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
