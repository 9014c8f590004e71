"""Serves HTTP calls of the UI in this process: small ASGI responses, and an httpx transport that streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope

from stable_diffusion_server.errors import MalformedRequest, ServerError, TooLarge
from stable_diffusion_server.ui.client import ServerAddress

SECONDS = 60.0
_BUFFERED_PARTS = 32
# Seconds to wait for a cancelled application. One that waits for a thread ends only when the thread ends.
_END_SECONDS = 1.0


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


class StreamingASGITransport(httpx.AsyncBaseTransport):
    """Calls `app` with the client address in a request's extension `client`, by default this machine.

    httpx's own ASGITransport waits for the whole response, without a timeout. Here `write` limits the time until the
    body is read, and `read` the time until the response begins and between its parts (`httpx.WriteTimeout`,
    `httpx.ReadTimeout`). The timeouts `connect` and `pool` have no effect.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Handle one request; the body of the response is a stream."""
        exchange = _Exchange(await request.aread(), request.extensions.get("timeout", {}))
        exchange.task = asyncio.create_task(exchange.run(self._app, _scope_of(request)))
        try:
            status, headers = await exchange.head()
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(status, headers=headers, stream=exchange)


class _Exchange(httpx.AsyncByteStream):
    """One request and its streaming response."""

    def __init__(self, body: bytes, timeouts: Mapping[str, float | None]) -> None:
        self._body: bytes | None = body
        self._write, self._read = timeouts.get("write"), timeouts.get("read")
        self._taken = asyncio.Event()
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(_BUFFERED_PARTS)
        self._closed = asyncio.Event()
        self._started: asyncio.Future[tuple[int, list[tuple[bytes, bytes]]]] = (
            asyncio.get_running_loop().create_future()
        )
        self.task: asyncio.Task[None] | None = None

    async def head(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Wait for status and headers of the response. Raises `httpx.WriteTimeout` and `httpx.ReadTimeout`."""
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
        """Run the application."""
        try:
            await app(scope, self._receive, self._send)
            if not self._started.done():
                self._started.set_exception(httpx.RemoteProtocolError("The server did not answer."))
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            if not self._closed.is_set():  # after aclose there is no reader, so `put` would block forever
                await self._parts.put(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body."""
        while (part := await self._next()) is not None:
            yield part

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._read):
                return await self._parts.get()
        except TimeoutError as error:
            raise httpx.ReadTimeout("The server did not go on with its answer.") from error

    async def aclose(self) -> None:
        """Disconnect and cancel the application."""
        self._closed.set()
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task], timeout=_END_SECONDS)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            self._taken.set()
            return {"type": "http.request", "body": body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._started.done():
            self._started.set_result((message["status"], list(message.get("headers", []))))
        elif message.get("body") and not self._closed.is_set():
            await self._parts.put(message["body"])


def _scope_of(request: httpx.Request) -> Scope:
    client = request.extensions.get("client", ServerAddress())
    # Marks a request that came through an untrusted proxy; its address does not matter.
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
