"""Middleware in front of Gradio that admits only the routes and events that our pages use."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from urllib.parse import parse_qs

from limits import RateLimitItem
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.concurrency import MovingWindows
from stable_diffusion_server.errors import InvalidInput, NotFound, RateLimited, ServerError
from stable_diffusion_server.ui.asgi_http import problem_response, read_body
from stable_diffusion_server.ui.gradio_events import SESSION, Events, sanitized

EVENT_BYTES = 65_536
# Maximum number of open streams per visitor: two for each open page.
STREAMS = 64

_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PAGE = re.compile(r"/ui/")
_FILES = re.compile(rf"/ui/(?:theme\.css|assets/{_NAME}|static/(?:{_NAME}/)*{_NAME})")
_HEARTBEAT = re.compile(r"/ui/gradio_api/heartbeat/(?P<session>[A-Za-z0-9]{1,64})")
_EVENT_STREAM, _EVENT = "/ui/gradio_api/queue/data", "/ui/gradio_api/queue/join"
# Forwarded headers. Gradio trusts others, which name users, hosts and folders.
_HEADERS = frozenset(
    b"host cookie accept accept-encoding content-type user-agent if-none-match if-modified-since".split()
)


class GradioGuard:
    """ASGI middleware in front of the application with Gradio, with an allowlist of routes.

    All other routes get 404, so that a new version of Gradio adds no open route. `events` are the events of the pages;
    `owner` returns a visitor's name, `rate` limits the events per visitor. Session names include the visitor's name, so
    that a visitor cannot use another visitor's session.
    """

    def __init__(
        self, app: ASGIApp, events: Events, owner: Callable[[Scope], str], rate: RateLimitItem | None = None
    ) -> None:
        self._app = app
        self._events = events
        self._owner = owner
        self._rate = rate
        self._events_sent = MovingWindows()
        self._streams: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an admitted request, or respond with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._admit(scope, receive, send)
            except ServerError as error:
                await problem_response(error)(scope, receive, send)
        else:
            raise NotFound("There is nothing here.")

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request. If it is not admitted, raises a `ServerError` before it sends anything."""
        method, path, query_string = scope["method"], scope["path"], scope["query_string"]
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] in _HEADERS], "query_string": b""}
        if method in ("GET", "HEAD") and path == "/ui":
            await RedirectResponse("/ui/")(scope, receive, send)
        elif method in ("GET", "HEAD") and (_PAGE.fullmatch(path) or _FILES.fullmatch(path)):
            await self._app(scope, _without_body(receive), send)
        elif method == "GET" and (heartbeat := _HEARTBEAT.fullmatch(path)):
            owner = self._owner(scope)
            path = f"/ui/gradio_api/heartbeat/{_session_of(owner, heartbeat['session'])}"
            await self._stream(owner, {**scope, "path": path, "raw_path": path.encode()}, receive, send)
        elif method == "GET" and path == _EVENT_STREAM:
            owner = self._owner(scope)
            query = f"session_hash={_session_of(owner, _session(query_string))}".encode()
            await self._stream(owner, {**scope, "query_string": query}, receive, send)
        elif method == "POST" and path == _EVENT:
            await self._event(scope, receive, send)
        else:
            raise NotFound("There is nothing here.")

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward an event with a body built from the validated values."""
        owner = self._owner(scope)
        if self._rate is not None and not self._events_sent.hit(owner, self._rate):
            _, seconds = self._events_sent.remaining(owner, self._rate)
            allowed = f"{self._rate.amount} events in {self._rate.get_expiry()} s are allowed."
            raise RateLimited(allowed, retry_after=max(1, math.ceil(seconds)))
        event = sanitized(await read_body(receive, EVENT_BYTES), self._events)
        event["session_hash"] = _session_of(owner, event["session_hash"])
        body = json.dumps(event).encode()
        more = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"] + more
        await self._app({**scope, "headers": headers}, _with_body(body, receive), send)

    async def _stream(self, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        if self._streams[owner] >= STREAMS:
            raise RateLimited(f"{STREAMS} streams at a time are allowed here.", retry_after=5)
        self._streams[owner] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._streams[owner] -= 1
            if not self._streams[owner]:
                del self._streams[owner]


def _session_of(owner: str, session: str) -> str:
    """Return the name of a visitor's session; another visitor cannot produce the same name."""
    return hashlib.sha256(f"{owner}\n{session}".encode()).hexdigest()[:40]


def _session(query: bytes) -> str:
    """Return the session name in a query. Raises `InvalidInput`."""
    given = parse_qs(query.decode("latin-1"), max_num_fields=4).get("session_hash", [])
    if len(given) != 1 or not SESSION.fullmatch(given[0]):
        raise InvalidInput("session_hash must be 1 to 64 letters and digits.", field="session_hash")
    return given[0]


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields this body first, then the messages of the original one."""
    sent = False

    async def receive_body() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


def _without_body(receive: Receive) -> Receive:
    return _with_body(b"", receive)
