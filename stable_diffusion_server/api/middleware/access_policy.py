"""Admits or rejects requests, by host name, web page (Origin, Sec-Fetch), client address and API key."""

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
from stable_diffusion_server.api.middleware.rate_limiter import FailedLoginLimiter, RateLimitStatus
from stable_diffusion_server.api.request_parsing import JSON_TYPES, BodyLimits
from stable_diffusion_server.errors import Forbidden, RateLimited, ServerError, TooLarge, Unauthorized, UnknownHost
from stable_diffusion_server.types import Caller

_PREFETCH = ("purpose", "sec-purpose", "x-moz")
# Accepted values of Sec-Fetch-Site: no other origin caused the request.
_OWN = frozenset(("same-origin", "none"))
_SAME_SITE = "same-site"
_HOST = re.compile(r"(\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:\d*)?")
# Public pages: they do not generate and hold no secrets, so other sites may link to them.
_OPEN_PATHS = ("/health", "/ping", "/favicon.ico", "/readyz", "/docs", "/openapi.json")
# Pages of other sites may embed these.
_EMBEDDABLE = ("/health", "/ping", "/favicon.ico", "/files/")
# Other sites may link to this page; the routes that it calls check the origin.
_PAGES = ("/ui", "/ui/")
# The response depends on the caller: some callers may read details.
_READY = "/readyz"
# Cheap, and clients poll them: these need a key, but do not count against its rate limit.
_CHEAP_PATHS = (
    "/metrics /jobs /history /files /ui /v1/models /v1/predictions /v1/webhooks /mcp "
    "/internal/progress /sdapi/v1/progress /sdapi/v1/interrupt "
    "/sdapi/v1/sd-models /sdapi/v1/samplers /sdapi/v1/options /sdapi/v1/loras /sdapi/v1/png-info "
    "/sdapi/v1/skip /sdapi/v1/cmd-flags /sdapi/v1/upscalers /sdapi/v1/latent-upscale-modes /sdapi/v1/schedulers "
    "/sdapi/v1/sd-vae /sdapi/v1/sd-modules /sdapi/v1/hypernetworks /sdapi/v1/face-restorers "
    "/sdapi/v1/realesrgan-models /sdapi/v1/prompt-styles /sdapi/v1/embeddings /sdapi/v1/scripts /sdapi/v1/script-info "
    "/sdapi/v1/extensions /sdapi/v1/memory /sdapi/v1/artists /sdapi/v1/artist-categories /sdapi/v1/lycos "
    "/sdapi/v1/refresh-checkpoints /sdapi/v1/refresh-vae /sdapi/v1/refresh-loras /sdapi/v1/refresh-embeddings "
    "/sdapi/v1/unload-checkpoint /sdapi/v1/reload-checkpoint /internal/ping /config /user /app_id "
    "/controlnet/version /controlnet/model_list /controlnet/module_list /controlnet/settings /controlnet/control_types "
    "/adetailer/v1/version /adetailer/v1/ad_model"
).split()
# Ends of paths under a cheap one that generate when they are posted: Replicate's predictions.
_PREDICTIONS = "/predictions"
# Routes whose JSON bodies hold images in base64.
_IMAGE_PATHS = (
    *("/v1/images/edits", "/v1/images/variations"),
    *("/inpaint_", "/style_transfer_", "/edit_", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/png-info"),
    *("/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images", "/sdapi/v1/interrogate", "/controlnet/detect"),
)
# Routes whose JSON bodies may hold control images, if they say that they are JSON.
_CONTROL_PATHS = ("/create_and_upload_image", "/make_image", "/v1/images/generations")
# Maximum digits of a `Content-Length`; `int` raises for more than 4300.
_LONGEST_LENGTH = 18
# Under a cheap path, but uploads to the UI are decoded, which costs time.
_UPLOAD_PATH = "/ui/pictures"
# Maximum bytes of other bodies under /ui, which are events of a page. Small, because they need no key.
PAGE_BYTES = 65_536
# Maximum bytes of a message of an agent: the package that reads it does so on the event loop.
AGENT_BYTES = 8_388_608
_AGENT_PATH = "/mcp"


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """Admits pages of this server, of the `allowed` origins, and with `same_site` those of the same site.

    Other ports and subdomains are the same site, but may belong to another owner.
    """

    allowed: frozenset[str] = frozenset()
    same_site: bool = False

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raise `Forbidden` for a request from a page of another origin, and for a prefetch."""
        origin, sites = headers.get("origin"), headers.getlist("sec-fetch-site")
        if origin in self.allowed:
            return
        if not (self.same_site and sites == [_SAME_SITE]):
            self._check_foreign(scope, headers, origin, sites)
        if any("prefetch" in headers.get(name, "").lower() for name in _PREFETCH):
            raise Forbidden("A prefetch does not draw.")

    def check_page(self, scope: Scope, headers: Headers) -> None:
        """Raise `Forbidden` if another origin embeds a public page. Links to the page are allowed.

        Embedded as an image, script or frame, the page would only cause useless work for the server.
        """
        foreign = [site for site in headers.getlist("sec-fetch-site") if site not in _OWN]
        modes, destinations = headers.getlist("sec-fetch-mode"), headers.getlist("sec-fetch-dest")
        by_link = modes in ([], ["navigate"]) and destinations in ([], ["document"])
        # Browsers without Sec-Fetch headers still send `Accept: text/html` for pages only.
        takes_pages = "sec-fetch-site" in headers or "text/html" in headers.get("accept", "text/html")
        prefetched = any("prefetch" in headers.get(name, "").lower() for name in _PREFETCH)
        if "origin" in headers or prefetched or not takes_pages or (foreign and not by_link):
            self.check(scope, headers)

    def _check_foreign(self, scope: Scope, headers: Headers, origin: str | None, sites: list[str]) -> None:
        own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}"
        if origin is not None and origin != own:
            raise Forbidden("Web pages of this origin may not draw; the setting CORS_ORIGINS adds origins.")
        if not _OWN.issuperset(sites):
            raise Forbidden(
                "Other web sites, and other ports and subdomains of this one, may not draw here; the setting "
                "CORS_ORIGINS adds origins, and ALLOW_SAME_SITE=1 the ports and subdomains."
            )
        referer = headers.get("referer")
        if origin is None and referer and not sites and not _is_of(referer, {own, *self.allowed}):
            # Old browsers, and plain http beyond loopback, have no Sec-Fetch-Site, but send this.
            raise Forbidden("Other web sites may not draw here; the setting CORS_ORIGINS adds origins.")


def _is_of(url: str, origins: set[str]) -> bool:
    return any(url == origin or url.startswith(f"{origin}/") for origin in origins)


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """An admitted request: its caller and rate limit (`None`: the request does not count)."""

    caller: Caller = field(default_factory=Caller)
    allowed: RateLimitStatus | None = None


@dataclass(frozen=True, slots=True)
class AccessPolicy:
    """Rules that admit requests. `hosts` are the accepted host names, in addition to loopback.

    `rate` and `concurrency` apply to keys without limits of their own, and to each address where no key is needed.
    `visitor_key` returns the API key with which the visitor logged in to the UI, from the request's headers.
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
        """The maximum lengths of texts and images in a body."""
        return BodyLimits(self.max_body_bytes, self.max_image_bytes)

    def body_limit(self, path: str, headers: Headers) -> int:
        """Return the maximum bytes of a body: more for uploads, which are multipart files or base64 in JSON."""
        if _is_under(path, ("/ui",)) and path != _UPLOAD_PATH:
            return min(PAGE_BYTES, self.max_body_bytes)
        if path == _AGENT_PATH:
            return min(AGENT_BYTES, self.max_upload_bytes)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        pictures = media_type in JSON_TYPES and (path.startswith(_IMAGE_PATHS) or _predicts(path))
        pictures = pictures or (media_type == JSON_TYPES[0] and path in _CONTROL_PATHS)
        long = pictures or media_type == "multipart/form-data" or path == _UPLOAD_PATH
        return self.max_upload_bytes if long else self.max_body_bytes

    def admit(self, scope: Scope, headers: Headers) -> AdmittedRequest:
        """Return the caller and its rate limit.

        Raises `UnknownHost`, `Forbidden`, `Unauthorized`, `RateLimited` or `TooLarge`.
        """
        self._check_host(headers)
        path: str = scope["path"]
        opened = _is_open(scope)
        if not opened and not (path in _PAGES and scope["method"] in ("GET", "HEAD")):
            self.origins.check(scope, headers)
        elif not path.startswith(_EMBEDDABLE):
            self.origins.check_page(scope, headers)
        if opened:
            return AdmittedRequest(self._known(scope, headers) if path == _READY else self._stranger(scope))
        if scope["method"] == "OPTIONS":
            return AdmittedRequest(self._stranger(scope))  # a preflight request carries no key
        admitted = self._admit_client(scope, headers)
        # BodyLimitMiddleware counts a body without a length while it is read.
        length, limit = headers.get("content-length", "0"), self.body_limit(path, headers)
        if length.isascii() and length.isdigit() and (len(length) > _LONGEST_LENGTH or int(length) > limit):
            raise TooLarge(f"A body may have {limit} bytes here.")
        works = scope["method"] == "POST" and (path == _UPLOAD_PATH or _predicts(path))
        cheap = _is_under(path, _CHEAP_PATHS) and not works
        return AdmittedRequest(admitted.caller) if cheap else admitted

    def _admit_client(self, scope: Scope, headers: Headers) -> AdmittedRequest:
        stranger = self._stranger(scope)
        if self.keys and _is_under(scope["path"], ("/ui",)):
            # A browser cannot send a key with a page load: the UI has a login, and sends the key to the API itself.
            shown = self.visitor_key(headers)
            return self._admit_key(self.keys.of(shown), stranger) if shown else AdmittedRequest(stranger)
        if self.keys and not (self.allow_anonymous and not holds_key(headers)):
            return self._admit_key(self._held(headers, stranger.address), stranger)
        if self.allow_anonymous:
            return AdmittedRequest(stranger, RateLimitStatus(stranger.share, self.rate, self.concurrency))
        # Behind a local proxy that the settings do not name, all clients seem to be on this machine.
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
        """Return the caller of a public page; anonymous if the request would not be admitted elsewhere."""
        try:
            return self._admit_client(scope, headers).caller
        except ServerError:
            return self._stranger(scope)

    def _held(self, headers: Headers, address: str) -> HashedApiKey:
        """Return the key of a request. Raises `Unauthorized`, and `RateLimited` after many wrong keys."""
        try:
            key = self.keys.holder(headers)
        except Unauthorized:
            if holds_key(headers) and (wait := self.wrong_keys.wrong(address)):
                raise RateLimited("Too many wrong keys came from this address.", retry_after=wait) from None
            raise
        # Behind a proxy that the settings do not name, all clients seem to be on this machine.
        if not is_loopback(address) and (wait := self.wrong_keys.right(address, key.caller.name)):
            raise RateLimited("Too many wrong keys came from this address.", retry_after=wait)
        return key

    def _stranger(self, scope: Scope) -> Caller:
        """Return an anonymous caller, which is identified by its network address only."""
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
    """Return whether a request is public: it has no side effects and returns no prompt."""
    path: str = scope["path"]
    if path.startswith("/files/"):
        return scope["method"] in ("GET", "HEAD") and "record" not in QueryParams(scope["query_string"])
    return path.startswith(_OPEN_PATHS) or path == "/"


@lru_cache(1024)
def network_of(address: str) -> str:
    """Return the network that identifies a client: its IPv4 address, or the /64 of its IPv6 address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address) or ip.is_loopback:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))


@lru_cache(1024)
def is_loopback(name: str) -> bool:
    """Return whether a host name or address is this machine's own."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def allowed_host_names(host: str, allowed: tuple[str, ...], public_base_url: str) -> frozenset[str]:
    """Return the host names in the settings, in lower case without ports, without wildcard addresses."""
    names = {_host_name(name) for name in (host, *allowed, urlsplit(public_base_url).netloc)}
    return frozenset(names - {"", "0.0.0.0", "::"})  # noqa: S104  # removed here, not bound to


def _host_name(host: str) -> str:
    """Return the name in a Host header or setting, in lower case, without port, brackets and final dot."""
    match = _HOST.fullmatch(host.strip())
    return (match["v6"] or match["name"]).lower().removesuffix(".") if match else ""


def _predicts(path: str) -> bool:
    """Return whether a request that is posted to a path makes a prediction."""
    return path.startswith("/v1/") and path.endswith(_PREDICTIONS)


def _is_under(path: str, roots: Collection[str]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)
