"""Who may draw: host names, origins, clients and keys. Knows no parameters."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from urllib.parse import urlsplit

from limits import RateLimitItem
from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from stable_diffusion_server.api.middleware.api_keys import ApiKeyring, HashedApiKey, holds_key
from stable_diffusion_server.api.middleware.failed_logins import FailedLoginLimiter
from stable_diffusion_server.api.middleware.origins import OriginPolicy
from stable_diffusion_server.api.middleware.rate_limiter import RateLimitStatus
from stable_diffusion_server.api.request_parsing import BodyLimits
from stable_diffusion_server.errors import Forbidden, RateLimited, ServerError, TooLarge, Unauthorized, UnknownHost
from stable_diffusion_server.types import Caller

_HOST = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:\d*)?")
# Reading these draws nothing and tells no secret, so a link on another page may lead here.
_OPEN_PATHS = ("/healthz", "/favicon.ico", "/readyz", "/docs", "/openapi.json")
# These cost nothing, and are shown in other pages too.
_SHOWN_ELSEWHERE = ("/healthz", "/favicon.ico", "/files/")
# Opening this page draws nothing, so that a link may lead here; what it does goes through doors that look.
_PAGES = ("/ui", "/ui/")
# How the server stands, in detail for who may know it.
_READY = "/readyz"
# Asked again and again by programs that wait, and cheap: they need a key, and are not counted against its rate.
_CHEAP_PATHS = (
    "/metrics /jobs /history /files /ui /v1/models /internal/progress /sdapi/v1/progress /sdapi/v1/interrupt "
    "/sdapi/v1/sd-models /sdapi/v1/samplers /sdapi/v1/options /sdapi/v1/loras /sdapi/v1/png-info"
).split()
# Where pictures come in as text in JSON, and bodies are long.
_PICTURE_PATHS = ("/inpaint_", "/style_transfer_", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/png-info")
# Digits of a `Content-Length`; Python's `int` refuses thousands.
_LONGEST_LENGTH = 18
# Under a cheap path, and yet work: pictures sent to the UI are decoded.
_UPLOAD_PATH = "/ui/pictures"
# The longest other body under /ui, an event of a page. Room is kept for no more: strangers without a key may send one.
PAGE_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that may go on: who asks, and what that one is allowed (`None`: the request is not counted)."""

    caller: Caller = field(default_factory=Caller)
    allowed: RateLimitStatus | None = None


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Who may draw. `hosts` are names this server answers to, beside loopback; `origins` tells which pages may draw.

    `rate` and `concurrency` hold for keys without their own, and for each address where no key is needed.
    `visitor_key` tells the key that a visitor of the UI has shown, from a request's headers.
    """

    hosts: frozenset[str] = frozenset()
    origins: OriginPolicy = field(default_factory=OriginPolicy)
    keys: ApiKeyring = field(default_factory=ApiKeyring)
    allow_anonymous: bool = False
    rate: RateLimitItem | None = None
    concurrency: int = 0
    max_body_bytes: int = 1_048_576
    max_upload_bytes: int = 33_554_432
    max_image_bytes: int = 20_971_520
    visitor_key: Callable[[Headers], str | None] = lambda headers: None
    wrong_keys: FailedLoginLimiter = field(default_factory=FailedLoginLimiter)

    @property
    def body_limits(self) -> BodyLimits:
        """How long the texts and the pictures within a body may be."""
        return BodyLimits(self.max_body_bytes, self.max_image_bytes)

    def body_limit(self, path: str, headers: Headers) -> int:
        """How many bytes a body may have: pictures come as files of multipart bodies, and in base64 in some JSON."""
        if _is_under(path, ("/ui",)) and path != _UPLOAD_PATH:
            return min(PAGE_BYTES, self.max_body_bytes)
        media_type = headers.get("content-type", "").lstrip().lower()
        pictures = media_type.startswith("application/json") and path.startswith(_PICTURE_PATHS)
        long = pictures or media_type.startswith("multipart/form-data") or path == _UPLOAD_PATH
        return self.max_upload_bytes if long else self.max_body_bytes

    def admit(self, scope: Scope, headers: Headers) -> AdmittedRequest:
        """Who asks. Raises `UnknownHost`, `Forbidden`, `Unauthorized`, `RateLimited` or `TooLarge` for others."""
        self._check_host(headers)
        path: str = scope["path"]
        opened = _is_open(scope)
        if not opened and not (path in _PAGES and scope["method"] in ("GET", "HEAD")):
            self.origins.check(scope, headers)
        elif not path.startswith(_SHOWN_ELSEWHERE):
            self.origins.check_page(scope, headers)
        if opened:
            return AdmittedRequest(self._known(scope, headers) if path == _READY else self._stranger(scope))
        if scope["method"] == "OPTIONS":
            return AdmittedRequest(self._stranger(scope))  # a preflight carries no key, and draws nothing
        admitted = self._admit_client(scope, headers)
        # A body without a length is counted while it is read, by BodyLimit.
        length, limit = headers.get("content-length", "0"), self.body_limit(path, headers)
        if length.isascii() and length.isdigit() and (len(length) > _LONGEST_LENGTH or int(length) > limit):
            raise TooLarge(f"A body may have {limit} bytes here.")
        cheap = _is_under(path, _CHEAP_PATHS) and not (path == _UPLOAD_PATH and scope["method"] == "POST")
        return AdmittedRequest(admitted.caller) if cheap else admitted

    def _admit_client(self, scope: Scope, headers: Headers) -> AdmittedRequest:
        stranger = self._stranger(scope)
        if self.keys and _is_under(scope["path"], ("/ui",)):
            # A page cannot send a key: the UI asks for one itself, and asks our doors with it.
            shown = self.visitor_key(headers)
            return self._admit_key(self.keys.of(shown), stranger) if shown else AdmittedRequest(stranger)
        if self.keys and not (self.allow_anonymous and not holds_key(headers)):
            return self._admit_key(self._held(headers, stranger.address), stranger)
        if self.allow_anonymous:
            return AdmittedRequest(stranger, RateLimitStatus(stranger.share, self.rate, self.concurrency))
        # A proxy on this machine that the settings do not name makes everyone look as if they were on it.
        if not is_loopback(stranger.address) or scope.get("state", {}).get("forwarded"):
            raise Forbidden(
                "Without a key only clients on this machine may draw: set API_KEYS, or ALLOW_ANONYMOUS=1 for everyone. "
                "A proxy on this machine makes its clients look so only if TRUSTED_PROXIES names it and it sends "
                "X-Forwarded-For."
            )
        return AdmittedRequest(
            replace(stranger, anonymous=False), RateLimitStatus(stranger.share, self.rate, self.concurrency)
        )

    def _known(self, scope: Scope, headers: Headers) -> Caller:
        """Who asks, where nobody has to say so."""
        try:
            return self._admit_client(scope, headers).caller
        except ServerError:
            return self._stranger(scope)

    def _held(self, headers: Headers, address: str) -> HashedApiKey:
        """The key a request was sent with. Raises `Unauthorized`, and `RateLimited` after many wrong ones."""
        try:
            key = self.keys.holder(headers)
        except Unauthorized:
            if holds_key(headers) and (wait := self.wrong_keys.wrong(address)):
                raise RateLimited("Too many wrong keys came from this address.", retry_after=wait) from None
            raise
        # Everyone looks as if they were here behind a proxy that the settings do not name.
        if not is_loopback(address) and (wait := self.wrong_keys.right(address, key.caller.name)):
            raise RateLimited("Too many wrong keys came from this address.", retry_after=wait)
        return key

    def _stranger(self, scope: Scope) -> Caller:
        """Whoever has shown no key: nobody, but for the address."""
        return Caller(anonymous=True, address=network_of((scope.get("client") or ("",))[0]))

    def _admit_key(self, key: HashedApiKey, stranger: Caller) -> AdmittedRequest:
        caller = replace(key.caller, address=stranger.address)
        return AdmittedRequest(
            caller, RateLimitStatus(caller.share, key.rate or self.rate, key.concurrency or self.concurrency)
        )

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else ""
        if not (is_loopback(name) or name in self.hosts):
            raise UnknownHost("This host name is not served here; the setting ALLOWED_HOSTS adds names.")


def _is_open(scope: Scope) -> bool:
    """Whether anyone may ask this: what draws nothing, changes nothing and tells no prompt."""
    path: str = scope["path"]
    if path.startswith("/files/"):
        return scope["method"] in ("GET", "HEAD") and "record" not in QueryParams(scope["query_string"])
    return path.startswith(_OPEN_PATHS) or path == "/"


@lru_cache(1024)
def network_of(address: str) -> str:
    """What tells one client from others: an IPv4 address, or the /64 of an IPv6 one, which one client has whole."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address) or ip.is_loopback:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))


@lru_cache(1024)
def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def allowed_host_names(host: str, allowed: tuple[str, ...], public_base_url: str) -> frozenset[str]:
    """The host names the settings name, lower-cased and without ports; wildcard addresses name nothing."""
    names = {_host_name(name) for name in (host, *allowed, urlsplit(public_base_url).netloc)}
    return frozenset(names - {"", "0.0.0.0", "::"})  # noqa: S104  # taken out here, not listened on


def _host_name(host: str) -> str:
    """The name in a Host header or setting: without port, brackets and a final dot, lower-cased; empty if none."""
    match = _HOST.fullmatch(host.strip())
    return (match["v6"] or match["name"]).lower().removesuffix(".") if match else ""


def _is_under(path: str, roots: Collection[str]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)
