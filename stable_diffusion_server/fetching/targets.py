"""Which address a URL means, and whether it is one of the public internet. Pure: opens nothing, resolves nothing."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from stable_diffusion_server.errors import InvalidInput

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL_LENGTH = 2048
PORTS = {"http": 80, "https": 443}

_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f\\]")
_HOST_NAME = re.compile(r"[a-z0-9._-]+")
_NUMERIC_LABEL = re.compile(r"\d+|0x[0-9a-f]*")

# Addresses that are not of the public internet, whatever the running Python's own tables say.
_CLOSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        "::/128 ::1/128 64:ff9b:1::/48 100::/64 2001:2::/48 2001:10::/28 2001:db8::/32 3fff::/20 5f00::/16 fc00::/7 "
        "fe80::/10 fec0::/10 ff00::/8"
    ).split()
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart: `host` in lower-case ASCII without brackets, `path` with the query, percent-encoded."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header."""
        return authority(self.host, self.port, self.scheme)

    @property
    def url(self) -> str:
        """The URL put together again."""
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """An address the operator lets be fetched from although it is not public: a host name or a network, and a port.

    Without a port, that of the scheme.
    """

    host: str = ""
    network: Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Allowance:
        """From `name`, `name:port`, `10.0.0.0/8`, `127.0.0.1:9000` or `[::1]:9000`. Raises `ValueError`."""
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

    def covers(self, target: Target, address: Address) -> bool:
        """Whether this address may be dialled for this target."""
        if target.port != (self.port or PORTS[target.scheme]):
            return False
        return address in self.network if self.network is not None else target.host == self.host


def parse(url: str, field: str) -> Target:
    """Take a URL apart. Raises `InvalidInput` for anything but a plain http or https address of a host."""

    def refused(why: str) -> InvalidInput:
        return InvalidInput(f"{field} {why}.", field=field)

    if len(url) > MAX_URL_LENGTH:
        raise refused(f"is longer than {MAX_URL_LENGTH} characters")
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
    return Target(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path)


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet; one that carries another in itself must carry a public one."""
    if address.is_multicast or any(address in network for network in _CLOSED):
        return False
    if isinstance(address, ipaddress.IPv6Address) and (carried := _carried(address)):
        return all(is_public(inner) for inner in carried)
    return address.is_global


def authority(host: str, port: int, scheme: str) -> str:
    """Host and port as a URL and the Host header have them; the scheme's own port is left out."""
    name = f"[{host}]" if ":" in host else host
    return name if port == PORTS[scheme] else f"{name}:{port}"


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses inside a transition form: mapped, 6to4, Teredo, NAT64 (RFC 6052), compatible, ISATAP."""
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64 or address in _V4_COMPATIBLE or int(address) >> 32 & 0xFFFFFFFF in _ISATAP:
        return [last]
    return []


def _ascii_host(name: str) -> str:
    """A host as it is dialled: an address in its usual spelling or a name in ASCII. Raises `ValueError`.

    Numbers in other spellings (octal, hexadecimal, one number for all four) are refused, since programs disagree on
    what they mean.
    """
    if ":" in name:
        return str(ipaddress.IPv6Address(name)) if "%" not in name else _no_host()
    host = name.encode("idna").decode().lower()
    if not _HOST_NAME.fullmatch(host):
        _no_host()
    if _NUMERIC_LABEL.fullmatch(host.rstrip(".").rsplit(".", 1)[-1]):
        return str(ipaddress.IPv4Address(host.rstrip(".")))
    return host


def _no_host() -> str:
    raise ValueError("no host")
