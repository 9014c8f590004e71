"""In-process ASGI transport: a request ends in time, whatever the application does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from stable_diffusion_server.ui.asgi_transport import StreamingASGITransport
from stable_diffusion_server.ui.client import ApiClient, RefusedError, UiRequest

pytestmark = pytest.mark.slow

BASE = "http://127.0.0.1:8000"
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
START = {"type": "http.response.start", "status": 200, "headers": []}


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and never answers."""
    await receive()
    await asyncio.Event().wait()


async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
    """Does not even read the body."""
    await asyncio.Event().wait()


async def stopping_midway(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the start of its response, then hangs."""
    await send(START)
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await asyncio.Event().wait()


async def without_a_body(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends only the response head."""
    await send(START)
    await asyncio.Event().wait()


async def in_a_thread(scope: Scope, receive: Receive, send: Send) -> None:
    """Waits for a thread, which cannot be cancelled."""
    await receive()
    await run_in_threadpool(time.sleep, 4)


async def refusing_to_end(scope: Scope, receive: Receive, send: Send) -> None:
    """Ignores cancellation."""
    await receive()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        try:
            await asyncio.sleep(4)
        except asyncio.CancelledError:
            continue


async def slow_but_going_on(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends a chunk now and then, in total longer than the timeout of one chunk."""
    await send(START)
    for _ in range(8):
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
    await send({"type": "http.response.body"})


def address_of(app: Application, timeouts: httpx.Timeout) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=StreamingASGITransport(app), base_url=BASE, timeout=timeouts)


@pytest.mark.fault(192)
@pytest.mark.parametrize(
    ("app", "timeouts", "error"),
    [
        (silent, httpx.Timeout(None, read=0.3), httpx.ReadTimeout),
        (silent, httpx.Timeout(0.3), httpx.ReadTimeout),
        (deaf, httpx.Timeout(None, write=0.3), httpx.WriteTimeout),
        (deaf, httpx.Timeout(0.3), httpx.WriteTimeout),
        (stopping_midway, httpx.Timeout(None, read=0.3), httpx.ReadTimeout),
        (without_a_body, httpx.Timeout(0.3), httpx.ReadTimeout),
        (in_a_thread, httpx.Timeout(0.3), httpx.ReadTimeout),
        (refusing_to_end, httpx.Timeout(0.3), httpx.ReadTimeout),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_route_that_does_not_answer_is_waited_for_so_long(
    app: Application, timeouts: httpx.Timeout, error: type[httpx.HTTPError]
) -> None:
    """With httpx's own timeouts and errors, as over a network.

    The transport does not wait for the application to end.
    """
    began = time.monotonic()
    with pytest.raises(error) as raised:
        await address_of(app, timeouts).post("/", content=b"a body")
    assert time.monotonic() - began < 3
    assert raised.value.request.url.path == "/"


@pytest.mark.fault(192)
async def test_what_goes_on_may_take_longer_and_no_timeout_is_none() -> None:
    """The timeout applies to each chunk; without one the transport waits indefinitely."""
    for timeout in (httpx.Timeout(0.5), httpx.Timeout(None)):
        answer = await address_of(slow_but_going_on, timeout).get("/")
        assert answer.content == b"part" * 8


@pytest.mark.fault(192)
async def test_a_visitor_sees_that_the_server_does_not_answer() -> None:
    """One sentence, for every request of a page; held slots are released."""
    http = address_of(silent, httpx.Timeout(0.2))
    request = http.request
    # As the UI client requests, but with a shorter timeout.
    http.request = lambda *given, **named: request(*given, **{**named, "timeout": 0.2})  # type: ignore[method-assign]  # to ask more briefly
    api = ApiClient(http, BASE)
    wanted = UiRequest("/v1/images/edits", {}, {"image": b"png"})
    for ask in (api.jobs, api.history, api.readiness, *[lambda: api.start(wanted)] * 10):
        with pytest.raises(RefusedError, match="cannot be reached"):
            await ask()
