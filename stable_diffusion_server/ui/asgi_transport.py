"""httpx's way to an ASGI application in this process, with answers that arrive while they are made. Knows no paths."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.types import ASGIApp, Message, Scope

from stable_diffusion_server.ui.client import ServerAddress

_AHEAD = 32
# Seconds to wait for a cancelled application; one that waits for a thread ends only when the thread does.
_END_SECONDS = 1.0


class StreamingASGITransport(httpx.AsyncBaseTransport):
    """Asks `app` as the client that a request's extension `client` names would, else as one on this machine.

    httpx's own transport waits for the whole answer, and for ever. Of a request's timeouts `write` is for the body to
    be taken and `read` for the answer to begin and for each part of it (`httpx.WriteTimeout`, `httpx.ReadTimeout`).
    There is nothing to connect to and no pool, so that those two are never waited for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request; the body can be read as it comes."""
        exchange = _Exchange(await request.aread(), request.extensions.get("timeout", {}))
        exchange.task = asyncio.create_task(exchange.run(self._app, _scope_of(request)))
        try:
            status, headers = await exchange.begun()
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(status, headers=headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request on its way through the application."""

    def __init__(self, body: bytes, timeouts: Mapping[str, float | None]) -> None:
        self._body: bytes | None = body
        self._write, self._read = timeouts.get("write"), timeouts.get("read")
        self._taken = asyncio.Event()
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(_AHEAD)
        self._left = asyncio.Event()
        self._started: asyncio.Future[tuple[int, list[tuple[bytes, bytes]]]] = (
            asyncio.get_running_loop().create_future()
        )
        self.task: asyncio.Task[None] | None = None

    async def begun(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers of the answer. Raises `httpx.WriteTimeout` and `httpx.ReadTimeout`."""
        if self._body:
            taken = asyncio.create_task(self._taken.wait())
            either: list[asyncio.Future[Any]] = [taken, self._started]
            await asyncio.wait(either, timeout=self._write, return_when=asyncio.FIRST_COMPLETED)
            taken.cancel()
            if not (self._taken.is_set() or self._started.done()):
                raise httpx.WriteTimeout("The server did not take the body.")
        await asyncio.wait([self._started], timeout=self._read)
        if not self._started.done():
            raise httpx.ReadTimeout("The server did not answer.")
        return self._started.result()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Let the application answer."""
        try:
            await app(scope, self._receive, self._send)
            if not self._started.done():
                self._started.set_exception(httpx.RemoteProtocolError("The server did not answer."))
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            if not self._left.is_set():  # a client that left reads no more: `put` would wait for ever
                await self._parts.put(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The parts of the body."""
        while (part := await self._next()) is not None:
            yield part

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._read):
                return await self._parts.get()
        except TimeoutError as error:
            raise httpx.ReadTimeout("The server did not go on with its answer.") from error

    async def aclose(self) -> None:
        """Tell the application that nobody listens any more."""
        self._left.set()
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task], timeout=_END_SECONDS)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            self._taken.set()
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._started.done():
            self._started.set_result((message["status"], list(message.get("headers", []))))
        elif message.get("body") and not self._left.is_set():
            await self._parts.put(message["body"])


def _scope_of(request: httpx.Request) -> Scope:
    client = request.extensions.get("client", ServerAddress())
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
