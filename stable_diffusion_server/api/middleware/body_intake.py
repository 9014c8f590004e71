"""Enforces a minimum arrival rate of bodies, and limits their memory in transit, in total and by caller."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.api.middleware.access_policy import AccessPolicy
from stable_diffusion_server.api.middleware.byte_budget import ByteBudget, Reservation
from stable_diffusion_server.api.problems import error_response
from stable_diffusion_server.errors import RateLimited, RequestTimedOut, ServerError


class BodyIntakeMiddleware:
    """ASGI middleware: answers 408 if a body arrives slower than `min_rate` bytes per second.

    Measures the rate over `seconds`, so a body may pause for that time. Reserves memory before it reads each part, from
    `max_bytes` shared fairly by caller. A request that gets no memory within `seconds` gets 429 and releases all.
    Anonymous callers share half of `max_bytes`, or the size of one upload if that is larger.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy, seconds: float, min_rate: float, max_bytes: int) -> None:
        self._app = app
        self._policy = policy
        self._seconds = seconds
        self._quota = seconds * min_rate
        self._budget = ByteBudget(max_bytes, max(max_bytes // 2, policy.max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body limited."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        owner, anonymous = _owner_of(scope)
        reservation = self._budget.reserve(owner, self._expected(scope), anonymous=anonymous)
        body = _Body(self._budget, reservation, self._seconds, self._quota, receive)
        started = False

        async def answer(message: Message) -> None:
            """Forward a response. If the body was rejected, the error replaces the response."""
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
        response = error_response(error, scope["path"], state.get("request_id", ""))
        response.headers["Connection"] = "close"  # the client may still send the rest of the body
        await response(scope, receive, send)

    def _expected(self, scope: Scope) -> int:
        """Return the `Content-Length` of a body, or its limit without one."""
        headers = Headers(scope=scope)
        limit = self._policy.body_limit(scope["path"], headers)
        length = headers.get("content-length", "")
        declared = int(length) if length.isascii() and length.isdigit() and len(length) < len(str(2**63)) else limit
        return min(declared, limit)


class _Body:
    """A body in transit."""

    def __init__(
        self, budget: ByteBudget, reservation: Reservation, seconds: float, quota: float, receive: Receive
    ) -> None:
        self._budget, self._reservation = budget, reservation
        self._seconds, self._quota, self._receive = seconds, quota, receive
        self._complete = False
        self._arrived = 0
        self._since = 0.0
        self._new = 0
        self.refused: ServerError | None = None

    async def receive(self) -> Message:
        """Return the next message of the request. Raises the error if the body is rejected."""
        if self._complete:
            return await self._receive()
        if self.refused is not None:
            raise self.refused
        await self._reserve_memory()
        left = self._since + self._seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise self._refuse(RequestTimedOut(f"The body brought too little in {self._seconds:g} seconds.")) from None
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._complete = True
            self.release()
            return message
        received = len(message.get("body", b""))
        self._arrived += received
        self._new += received
        if self._new >= self._quota:
            self._since, self._new = time.monotonic(), 0
        return message

    def release(self) -> None:
        """Release the memory."""
        self._budget.release(self._reservation)

    async def _reserve_memory(self) -> None:
        began = time.monotonic()
        self._since = self._since or began
        try:
            async with asyncio.timeout(self._seconds):
                await self._budget.make_room(self._reservation, self._arrived)
        except TimeoutError:
            error = RateLimited("Too many bodies are being sent at a time.", retry_after=1)
            raise self._refuse(error) from None
        self._since += time.monotonic() - began  # time spent waiting for memory does not count

    def _refuse(self, error: ServerError) -> ServerError:
        self.release()
        self.refused = error
        return error


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"transfer-encoding" in names or any(
        name == b"content-length" and value != b"0" for name, value in scope["headers"]
    )


def _owner_of(scope: Scope) -> tuple[str, bool]:
    """Return the owner for fair sharing (the caller, otherwise the address), and whether it is anonymous."""
    caller = scope.get("state", {}).get("caller")
    if caller is not None and (caller.name or caller.address):
        return str(caller.share), caller.anonymous
    return f"address {(scope.get('client') or ('',))[0]}", True
