"""How long bodies may take to arrive, and how many bytes of them are taken in at a time, of each caller and in all."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.api.security.policy import Policy
from stable_diffusion_server.api.shapes import refusal
from stable_diffusion_server.errors import Overasked, RequestTimedOut, ServerError
from stable_diffusion_server.fair_limiter import FairLimiter

# A body counts at least this much, so that the number of small ones is bounded too.
_LEAST = 65_536


class BodyIntake:
    """ASGI middleware: a body arrives at `min_rate` bytes a second at the least, else the request is answered 408.

    It is measured over `seconds` at a time: so long a body may stand still. Before any of it is read, room for all
    that it says it has is taken of `max_bytes`, shared out by caller; who gets none in `seconds` is answered 429.
    """

    def __init__(self, app: ASGIApp, policy: Policy, seconds: float, min_rate: float, max_bytes: int) -> None:
        self._app = app
        self._policy = policy
        self._seconds = seconds
        self._quota = seconds * min_rate
        self._max_bytes = max_bytes
        self._room = FairLimiter(max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body taken in within bounds."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        body = _Body(self._room, _share_of(scope), self._expected(scope), self._seconds, self._quota, receive)
        started = False

        async def answer(message: Message) -> None:
            """Pass an answer on; that of an application whose body was refused is replaced by the refusal."""
            nonlocal started
            if body.refused is not None and not started:
                return
            started = True
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        except Exception:
            if body.refused is None or started:
                raise
        finally:
            body.release()
        if body.refused is not None and not started:
            await self._refuse(body.refused, scope, receive, send)

    async def _refuse(self, error: ServerError, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        state["reason"] = error.kind
        response = refusal(error, scope["path"], state.get("request_id", ""))
        response.headers["Connection"] = "close"  # the rest of the body may still come
        await response(scope, receive, send)

    def _expected(self, scope: Scope) -> int:
        """The bytes a body says it has; what may be read of it where it does not say."""
        headers = Headers(scope=scope)
        limit = self._policy.body_limit(scope["path"], headers)
        length = headers.get("content-length", "")
        told = int(length) if length.isascii() and length.isdigit() and len(length) < len(str(2**63)) else limit
        return min(max(min(told, limit), _LEAST), self._max_bytes)


class _Body:
    """One body on its way in."""

    def __init__(
        self, room: FairLimiter, share: str, expected: int, seconds: float, quota: float, receive: Receive
    ) -> None:
        self._room, self._share, self._expected = room, share, expected
        self._seconds, self._quota, self._receive = seconds, quota, receive
        self._held = False
        self._complete = False
        self._since = 0.0
        self._new = 0
        self.refused: ServerError | None = None

    async def receive(self) -> Message:
        """The next part of the body, or what comes after it. Raises what the body is refused for."""
        if self._complete:
            return await self._receive()
        if self.refused is not None:
            raise self.refused
        if not self._held:
            await self._take()
        left = self._since + self._seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            self.release()
            self.refused = RequestTimedOut(f"The body brought too little in {self._seconds:g} seconds.")
            raise self.refused from None
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._complete = True
            self.release()
            return message
        self._new += len(message.get("body", b""))
        if self._new >= self._quota:
            self._since, self._new = time.monotonic(), 0
        return message

    def release(self) -> None:
        """Give the room back."""
        if self._held:
            self._held = False
            self._room.release(self._share, self._expected)

    async def _take(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._room.take(self._share, self._expected)
        except TimeoutError:
            self.refused = Overasked("Too many bodies are being sent at a time.", retry_after=1)
            raise self.refused from None
        self._held = True
        self._since = time.monotonic()


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names or any(
        name == b"content-length" and value != b"0" for name, value in scope["headers"]
    )


def _share_of(scope: Scope) -> str:
    """Who a body is of: the caller, or where none is known yet (the pages of the UI) its address."""
    caller = scope.get("state", {}).get("caller")
    if caller is not None and (caller.name or caller.address):
        return str(caller.share)
    return f"address {(scope.get('client') or ('',))[0]}"
