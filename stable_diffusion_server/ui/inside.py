"""httpx's way to an ASGI application in this process, with answers that arrive while they are made. Knows no paths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from urllib.parse import unquote

import httpx
from starlette.types import ASGIApp, Message, Scope

from stable_diffusion_server.ui.desk import Client

_AHEAD = 32


class Inside(httpx.AsyncBaseTransport):
    """Asks `app` as the client that a request's extension `client` names would, else as one on this machine.

    httpx's own transport waits for the whole answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; the body can be read as it comes."""
        exchange = _Exchange(await request.aread())
        exchange.task = asyncio.create_task(exchange.run(self._app, _scope_of(request)))
        try:
            status, headers = await exchange.started
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(status, headers=headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request on its way through the application."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
        self._left = asyncio.Event()
        self.started: asyncio.Future[tuple[int, list[tuple[bytes, bytes]]]] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Let the application answer."""
        try:
            await app(scope, self._receive, self._send)
            if not self.started.done():
                self.started.set_exception(httpx.RemoteProtocolError("The server did not answer."))
        except Exception as error:
            if not self.started.done():
                self.started.set_exception(error)
        finally:
            if not self._left.is_set():  # who has left takes nothing more, and room would be waited for in vain
                await self._parts.put(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The parts of the body."""
        while (part := await self._parts.get()) is not None:
            yield part

    async def aclose(self) -> None:
        """Tell the application that nobody listens any more."""
        self._left.set()
        if self.task is not None and not self.task.done():
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started.set_result((message["status"], list(message.get("headers", []))))
        elif message.get("body") and not self._left.is_set():
            await self._parts.put(message["body"])


def _scope_of(request: httpx.Request) -> Scope:
    client = request.extensions.get("client", Client())
    # What says that a request came through somebody else's proxy; who that is has no bearing.
    forwarded = [(b"forwarded", b"for=unknown")] if client.forwarded else []
    path, _, query = request.url.raw_path.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*((name.lower(), value) for name, value in request.headers.raw), *forwarded],
        "client": (client.address, 0),
        "state": {"inside": True},
        "server": (request.url.host, request.url.port),
    }
