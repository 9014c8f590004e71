"""Who may draw: host names, origins, clients, keys; and a request id for all. Knows no parameters."""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stable_diffusion_server.api.handlers import problem
from stable_diffusion_server.errors import Forbidden, Misdirected, ServerError, TooLarge, Unauthorized

_log = structlog.get_logger("access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:\d*)?")
# Reading these draws nothing and tells no secret, so a link or an <img> on another page may lead here.
_OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may draw. `hosts` are names this server answers to, beside loopback; `origins` are pages that may draw."""

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_anonymous: bool = False
    max_body_bytes: int = 1_048_576
    max_upload_bytes: int = 33_554_432

    def body_limit(self, headers: Headers) -> int:
        """How many bytes the body of a request may have: files come in multipart bodies, and in no others."""
        multipart = headers.get("content-type", "").lower().startswith("multipart/form-data")
        return self.max_upload_bytes if multipart else self.max_body_bytes

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise `Misdirected`, `Forbidden`, `Unauthorized` or `TooLarge` for a request that may not go on."""
        self._check_host(headers)
        if _is_open(scope):
            return
        self._check_origin(scope, headers)
        if scope["method"] == "OPTIONS":
            return  # a preflight carries no key, and draws nothing
        if self.api_keys:
            self._check_key(headers)
        elif not self.allow_anonymous and not _is_loopback((scope.get("client") or ("",))[0]):
            raise Forbidden(
                "Without a key only clients on this machine may draw: set API_KEYS, or ALLOW_ANONYMOUS=1 for everyone."
            )
        # A body without a length is counted while it is read, by BodyLimit.
        if int(headers.get("content-length", "0")) > (limit := self.body_limit(headers)):
            raise TooLarge(f"A body may have {limit} bytes here.")

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if not (_is_loopback(name) or name in self.hosts):
            raise Misdirected("This host name is not served here; the setting ALLOWED_HOSTS adds names.")

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """Keep web pages of other origins from drawing (they could not read the answer, but would use the device)."""
        origin = headers.get("origin")
        if origin in self.origins:
            return
        own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}"
        if origin is not None and origin != own:
            raise Forbidden("Web pages of this origin may not draw; the setting CORS_ORIGINS adds origins.")
        if headers.get("sec-fetch-site") == "cross-site":
            raise Forbidden("Other web sites may not draw here; the setting CORS_ORIGINS adds origins.")
        referer = headers.get("referer")
        if origin is None and referer and "sec-fetch-site" not in headers and not _is_of(referer, {own, *self.origins}):
            # Browsers that send no Sec-Fetch-Site (old ones, or plain http elsewhere than loopback) still say this.
            raise Forbidden("Other web sites may not draw here; the setting CORS_ORIGINS adds origins.")
        if "prefetch" in headers.get("sec-purpose", ""):
            raise Forbidden("A prefetch does not draw.")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, so that the time tells nothing about which one came close.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in self.api_keys]
        if not any(matches):
            raise Unauthorized("Send a key as 'Authorization: Bearer …' or 'X-API-Key: …'.")


class Gate:
    """ASGI middleware: gives each request an id, lets the policy decide, and logs what was answered.

    Query strings are not logged: prompts are the caller's own business.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what is no request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status, started = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._policy.check(scope, headers)
            except ServerError as error:
                await problem(error, request_id)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
            finally:
                seconds = round(time.perf_counter() - started, 4)
                quiet = status == HTTPStatus.OK and scope["path"] in ("/healthz", "/readyz", "/metrics")
                level = _log.debug if quiet else _log.info
                level("request", method=scope["method"], path=scope["path"], status=status, seconds=seconds)


class BodyLimit:
    """ASGI middleware: counts the bytes of a body while it is read, up to the policy's limit for that request."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._policy = policy
        limits = {policy.max_body_bytes, policy.max_upload_bytes}
        self._counted = {limit: RequestBodyLimitMiddleware(app, max_body_size=limit) for limit in limits}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body counted."""
        headers = Headers(raw=scope.get("headers", []))
        await self._counted[self._policy.body_limit(headers)](scope, receive, send)


def allowed_host_names(host: str, allowed: tuple[str, ...], public_base_url: str) -> frozenset[str]:
    """The host names the settings name, lower-cased and without ports; wildcard addresses name nothing."""
    names = {_host_name(name) for name in (host, *allowed, urlsplit(public_base_url).netloc)}
    return frozenset(names - {"", "0.0.0.0", "::"})  # noqa: S104  # taken out here, not listened on


def _is_open(scope: Scope) -> bool:
    """Whether anyone may ask this: what draws nothing, changes nothing and tells no prompt."""
    if scope["path"].startswith("/files/"):
        return scope["method"] in ("GET", "HEAD") and "record" not in QueryParams(scope["query_string"])
    return bool(scope["path"].startswith(_OPEN_PATHS)) or scope["path"] == "/"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _host_name(host: str) -> str:
    """The name in a Host header or setting: without port, brackets and a final dot, lower-cased; empty if none."""
    match = _HOST.fullmatch(host.strip())
    return (match["v6"] or match["name"]).lower().removesuffix(".") if match else ""


def _is_of(url: str, origins: set[str]) -> bool:
    return any(url == origin or url.startswith(f"{origin}/") for origin in origins)


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
