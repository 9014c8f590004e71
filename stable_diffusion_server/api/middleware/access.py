"""Access middleware (request id, admission, access log), and the middleware that limits body sizes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from http import HTTPStatus
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.api.http_responses import add_security_headers
from stable_diffusion_server.api.middleware.access_policy import AGENT_BYTES, PAGE_BYTES, AccessPolicy
from stable_diffusion_server.api.middleware.proxy_headers import TrustedProxies
from stable_diffusion_server.api.middleware.rate_limiter import RateLimiter, RateLimitStatus
from stable_diffusion_server.api.problems import error_response, unexpected_response
from stable_diffusion_server.errors import HeadersTooLarge, ServerError
from stable_diffusion_server.observability import RequestSample, Tracing
from stable_diffusion_server.types import Caller

_log = structlog.get_logger("access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# The dot matches line breaks, so that no path is tried twice. A longer path is no slip.
_SLIP = re.compile(r"/*(?:(?:api/+)?v1/+)?(images/+(?:generations|edits|variations)|models(?:/.*)?)/*", re.DOTALL)
_SLASHES = re.compile(r"/{2,}")
_LONGEST_SLIP = 1000
_QUIET = ("/healthz", "/health", "/ping", "/readyz", "/metrics")
# uvicorn's h11 limits all headers to 64 KiB; its httptools, where installed, and other servers have no limit.
_HEAD_MAX_BYTES, _MAX_HEADERS, _HEADER_MAX_BYTES = 65_536, 128, 16_384


def check_header_limits(scope: Scope) -> None:
    """Raise `HeadersTooLarge` if path, query and headers of a request are too long, or the headers too many."""
    path = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
    # Measures one header more than the limit, so that any number of headers costs the same.
    sizes = [len(name) + len(value) for name, value in scope["headers"][: _MAX_HEADERS + 1]]
    if len(sizes) > _MAX_HEADERS or path + sum(sizes) > _HEAD_MAX_BYTES:
        raise HeadersTooLarge(f"The head of a request may have {_HEAD_MAX_BYTES} bytes and {_MAX_HEADERS} headers.")
    if max(sizes, default=0) > _HEADER_MAX_BYTES:
        raise HeadersTooLarge(f"A header may have {_HEADER_MAX_BYTES} bytes.")


def canonical_path(path: str) -> str:
    """Return the path of the OpenAI route that a path means: without `/v1`, with `/api/v1`, or with further slashes.

    Returns every other path unchanged.
    """
    match = _SLIP.fullmatch(path) if len(path) <= _LONGEST_SLIP else None
    if match is None:
        return path
    return "/v1/" + _SLASHES.sub("/", match[1]).rstrip("/")


class AccessMiddleware:
    """ASGI middleware: gives each request an id, applies the policy, and logs the response.

    Sets `state.caller`, and mends the path of an OpenAI route that a slip in a base URL missed. Does not log query
    strings, because they hold prompts. `record_request` receives a sample of each request, `tracing` a span.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        proxies: TrustedProxies,
        record_request: Callable[[RequestSample], object] = lambda sample: None,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._policy = policy
        self._proxies = proxies
        self._record_request = record_request
        self._tracing = tracing or Tracing()
        self._rates = RateLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an HTTP request; pass on other scopes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _mended(self._proxies.seen_through(scope, receive))
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope["state"]["request_id"] = request_id
        status, answering, started = 500, False, time.perf_counter()
        more: dict[str, str] = {"X-Request-ID": request_id}

        async def send_with_headers(message: Message) -> None:
            nonlocal status, answering
            if message["type"] == "http.response.start":
                status, answering = message["status"], True
                MutableHeaders(scope=message).update(more)
                add_security_headers(message, scope["path"])
            await send(message)

        facts = {"http.request.method": scope["method"], "sds.request_id": request_id}
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            self._tracing.span(scope["method"], facts, parent_headers=headers) as span,
        ):
            try:
                await self._enter(scope, headers, receive, send_with_headers, more)
            except Exception as error:
                if answering:
                    raise
                # Here, so that the response has all headers: those of this middleware, and those of CORS.
                await unexpected_response(error, scope["path"], request_id)(scope, receive, send_with_headers)
            finally:
                sample = _sample_of(scope, status, time.perf_counter() - started)
                self._record_request(sample)
                _log_request(scope, sample)
                span.name(f"{scope['method']} {sample.route}".strip())
                span.set_attributes(
                    {"http.response.status_code": status, "http.route": sample.route, "sds.key": sample.key}
                )

    async def _enter(self, scope: Scope, headers: Headers, receive: Receive, send: Send, more: dict[str, str]) -> None:
        """Forward an admitted request, or answer a rejected one. Adds response headers to `more`."""
        allowed: RateLimitStatus | None = None
        state = scope["state"]
        state["caller"] = Caller(anonymous=True)
        try:
            check_header_limits(scope)
            admitted = self._policy.admit(scope, headers)
            state["caller"] = admitted.caller
            if admitted.caller.name:
                structlog.contextvars.bind_contextvars(key=admitted.caller.name)
            if admitted.allowed is not None:
                try:
                    await self._rates.enter(admitted.allowed)
                    allowed = admitted.allowed
                finally:
                    more.update(await self._rates.headers(admitted.allowed))
        except ServerError as error:
            state["reason"] = error.kind
            await error_response(error, scope["path"], state["request_id"])(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if allowed is not None:
                self._rates.leave(allowed)


class BodyLimitMiddleware:
    """ASGI middleware: limits the bytes of a body while it is read; the policy has the limit of each request."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._policy = policy
        limits = {policy.max_body_bytes, policy.max_upload_bytes, min(PAGE_BYTES, policy.max_body_bytes)}
        limits.add(min(AGENT_BYTES, policy.max_upload_bytes))
        self._counted = {limit: RequestBodyLimitMiddleware(app, max_body_size=limit) for limit in limits}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body limited."""
        headers = Headers(raw=scope.get("headers", []))
        if scope["type"] == "http":
            scope.setdefault("state", {})["body_limits"] = self._policy.body_limits
        await self._counted[self._policy.body_limit(scope.get("path", ""), headers)](scope, receive, send)


def _mended(scope: Scope) -> Scope:
    """Return the scope with the path of the OpenAI route that its path means."""
    path = canonical_path(scope["path"])
    return scope if path == scope["path"] else {**scope, "path": path, "raw_path": path.encode("utf-8", "replace")}


def _sample_of(scope: Scope, status: int, seconds: float) -> RequestSample:
    """Return the sample of a request; the route is set only if the request reached one."""
    route = getattr(scope.get("route"), "path", "")
    return RequestSample(route, status, seconds, scope["state"].get("reason", ""), scope["state"]["caller"].name)


def _log_request(scope: Scope, sample: RequestSample) -> None:
    """Log a request by its path, without the query, which holds prompts."""
    path = scope["path"]
    quiet = sample.status == HTTPStatus.OK and (path in _QUIET or path.startswith("/ui/"))
    level = _log.debug if quiet else _log.info
    why = {"reason": sample.reason} if sample.reason else {}
    level("request", method=scope["method"], path=path, status=sample.status, seconds=round(sample.seconds, 4), **why)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex
