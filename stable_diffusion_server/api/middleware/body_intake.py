"""How long bodies may take to arrive, and how many bytes of them are taken in at a time, of each caller and in all."""

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
    """ASGI middleware: a body arrives at `min_rate` bytes a second at the least, else the request is answered 408.

    It is measured over `seconds` at a time: so long a body may stand still. Before a part of it is read, memory for
    that part is taken of `max_bytes`, shared out by caller; who gets none in `seconds` is answered 429, and gives back
    what it held. Anonymous callers have half of it together, or as much as one upload takes, if that is more.
    """

    def __init__(self, app: ASGIApp, policy: AccessPolicy, seconds: float, min_rate: float, max_bytes: int) -> None:
        self._app = app
        self._policy = policy
        self._seconds = seconds
        self._quota = seconds * min_rate
        self._budget = ByteBudget(max_bytes, max(max_bytes // 2, policy.max_upload_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body taken in within bounds."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        owner, anonymous = _owner_of(scope)
        reservation = self._budget.reserve(owner, self._expected(scope), anonymous=anonymous)
        body = _Body(self._budget, reservation, self._seconds, self._quota, receive)
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
        response = error_response(error, scope["path"], state.get("request_id", ""))
        response.headers["Connection"] = "close"  # the rest of the body may still come
        await response(scope, receive, send)

    def _expected(self, scope: Scope) -> int:
        """The bytes a body says it has; what may be read of it where it does not say."""
        headers = Headers(scope=scope)
        limit = self._policy.body_limit(scope["path"], headers)
        length = headers.get("content-length", "")
        told = int(length) if length.isascii() and length.isdigit() and len(length) < len(str(2**63)) else limit
        return min(told, limit)


class _Body:
    """One body on its way in."""

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
        """The next part of the body, or what comes after it. Raises what the body is refused for."""
        if self._complete:
            return await self._receive()
        if self.refused is not None:
            raise self.refused
        await self._make_room()
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
        brought = len(message.get("body", b""))
        self._arrived += brought
        self._new += brought
        if self._new >= self._quota:
            self._since, self._new = time.monotonic(), 0
        return message

    def release(self) -> None:
        """Give the memory back."""
        self._budget.release(self._reservation)

    async def _make_room(self) -> None:
        began = time.monotonic()
        self._since = self._since or began
        try:
            async with asyncio.timeout(self._seconds):
                await self._budget.make_room(self._reservation, self._arrived)
        except TimeoutError:
            error = RateLimited("Too many bodies are being sent at a time.", retry_after=1)
            raise self._refuse(error) from None
        self._since += time.monotonic() - began  # nothing was read meanwhile, whatever was sent

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
    """Whose a body is (the caller's, or where none is known yet that of its address), and whether that is anonymous."""
    caller = scope.get("state", {}).get("caller")
    if caller is not None and (caller.name or caller.address):
        return str(caller.share), caller.anonymous
    return f"address {(scope.get('client') or ('',))[0]}", True
