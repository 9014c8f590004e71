"""Parses URLs strictly, and matches them against the operator's allow-list; does no I/O."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed
from stable_diffusion_server.net.public_ip import Address, Network

MAX_URL_LENGTH = 2048
PORTS = {"http": 80, "https": 443}
# Statuses of answers that name another URL.
REDIRECTS = (301, 302, 303, 307, 308)

_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f\\]")
_HOST_NAME = re.compile(r"[a-z0-9._-]+")
_NUMERIC_LABEL = re.compile(r"\d+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class UrlTarget:
    """A parsed URL: `host` in lower-case ASCII without brackets, `path` with the query, percent-encoded."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as in the Host header."""
        return authority(self.host, self.port, self.scheme)

    @property
    def url(self) -> str:
        """The URL in normal form."""
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class AllowedTarget:
    """An entry of FETCH_ALLOW: a host name or a network that may be connected to although it is not public.

    Without a port, the entry allows the default port of the URL's scheme.
    """

    host: str = ""
    network: Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> AllowedTarget:
        """Parse `name`, `name:port`, `10.0.0.0/8`, `127.0.0.1:9000` or `[::1]:9000`. Raises `ValueError`."""
        try:
            return cls(network=ipaddress.ip_network(text))
        except ValueError:
            parts = urlsplit(f"//{text}")
        if not parts.hostname or parts.netloc != text or "@" in text:
            raise ValueError(f"{text!r} is not a host or a network")
        try:
            return cls(network=ipaddress.ip_network(parts.hostname), port=parts.port)
        except ValueError:
            return cls(host=parts.hostname, port=parts.port)

    def covers(self, target: UrlTarget, address: Address) -> bool:
        """Whether the entry allows a connection to this address for this target."""
        if target.port != (self.port or PORTS[target.scheme]):
            return False
        return address in self.network if self.network is not None else target.host == self.host


def parse_url(url: str, field: str, longest: int = MAX_URL_LENGTH) -> UrlTarget:
    """Parse an http or https URL. Raises `InvalidInput` for anything else; `field` is named in the error."""

    def refused(reason: str) -> InvalidInput:
        return InvalidInput(f"{field} {reason}.", field=field)

    if len(url) > longest:
        raise refused(f"is longer than {longest} characters")
    if _UNPRINTABLE.search(url):
        raise refused("holds blanks, control characters or backslashes")
    try:
        parts = urlsplit(url)
        host, port = _ascii_host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise refused("is not a URL") from error
    if parts.scheme not in PORTS:
        raise refused("is not an http or https address")
    if "@" in parts.netloc:
        raise refused("holds a user name or password")
    query = f"?{parts.query}" if parts.query else ""
    path = quote((parts.path or "/") + query, safe="/?%:@!$&'()*+,;=~[]|", errors="replace")
    return UrlTarget(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path)


def redirect_target(target: UrlTarget, location: str, field: str, longest: int = MAX_URL_LENGTH) -> UrlTarget:
    """Where a redirect of `target` leads. Raises `InvalidInput` for a URL that is malformed or not allowed."""
    if not location:
        raise RemoteFetchFailed(f"{field} redirects to nowhere.", field=field)
    try:
        url = urljoin(target.url, location)
    except ValueError as error:
        raise InvalidInput(f"{field} redirects to what is not a URL.", field=field) from error
    redirect = parse_url(url, field, longest)
    if (target.scheme, redirect.scheme) == ("https", "http"):
        raise InvalidInput(f"{field} redirects from https to http.", field=field)
    return redirect


def authority(host: str, port: int, scheme: str) -> str:
    """Host and port as in a URL or a Host header, without the scheme's default port."""
    name = f"[{host}]" if ":" in host else host
    return name if port == PORTS[scheme] else f"{name}:{port}"


def _ascii_host(name: str) -> str:
    """A host name in ASCII, or an IP address in its canonical form. Raises `ValueError`.

    IPv4 addresses in other notations (octal, hexadecimal, a single number) are rejected, because programs disagree on
    their meaning.
    """
    if ":" in name:
        return str(ipaddress.IPv6Address(name)) if "%" not in name else _reject_host()
    host = name.encode("idna").decode().lower()
    if not _HOST_NAME.fullmatch(host):
        _reject_host()
    if _NUMERIC_LABEL.fullmatch(host.rstrip(".").rsplit(".", 1)[-1]):
        return str(ipaddress.IPv4Address(host.rstrip(".")))
    return host


def _reject_host() -> str:
    raise ValueError("no host")
