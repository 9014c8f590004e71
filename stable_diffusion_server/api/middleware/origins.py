"""Checks the web page that sent a request, by the Origin, Referer and Sec-Fetch headers."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from stable_diffusion_server.errors import Forbidden

_PREFETCH = ("purpose", "sec-purpose", "x-moz")
# Accepted values of Sec-Fetch-Site: no other origin caused the request.
_OWN = frozenset(("same-origin", "none"))
_SAME_SITE = "same-site"


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
