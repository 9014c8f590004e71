"""Concurrency helpers of requests: cancel on disconnect, gather or cancel, run large work on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from stable_diffusion_server.errors import NotReady

P = ParamSpec("P")
T = TypeVar("T")

# Bytes or characters. Below this size a thread costs more than the work.
_LARGE = 65_536


def text_size(value: object) -> int:
    """Return the characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(text_size, parts))


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`. If the client disconnects first, cancel `work` and return `None`.

    Read the body before this call. Raises `NotReady` if the server shuts down in the meantime.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        await disconnect  # raises if the body is too long
        return None
    except asyncio.CancelledError:
        # uvicorn cancels requests after its grace period; tell the client why.
        raise NotReady("The server is going down.", retry_after=5) from None
    finally:
        task.cancel()
        disconnect.cancel()


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client disconnects. Read the body before this call."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. If one fails, cancel the others and raise its error, not an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the group lists errors in the order of their occurrence
    return [task.result() for task in tasks]


async def run_if_large(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work`, in a worker thread if its input has more than 64 Ki bytes or characters (`size`)."""
    return await run_in_threadpool(work, *args, **kwargs) if size > _LARGE else work(*args, **kwargs)
