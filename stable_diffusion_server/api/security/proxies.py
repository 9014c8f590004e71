"""Who a request is from and what it was sent to, behind proxies: their headers count from those the settings name."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

_FORWARDING = frozenset((b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"forwarded"))

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies whose headers are believed."""

    trusted: tuple[Network, ...] = ()

    def seen_through(self, scope: Scope) -> Scope:
        """The request as the proxies tell of it, when the connection comes from one of them; else as it is.

        The client becomes the last address that is no trusted proxy's, the scheme and the Host header what the
        client used, with the port of `X-Forwarded-Port` where the name came without one. `state.forwarded` tells
        that a request came through a proxy that is not trusted.
        """
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["forwarded"] = not _FORWARDING.isdisjoint(name for name, _ in scope["headers"])
        client = scope.get("client")
        if not client or not self._trusts(client[0]):
            return scope
        seen = {**scope}
        hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
        strangers = [hop for hop in hops if not self._trusts(hop)]
        if hops:
            seen["client"] = (strangers[-1] if strangers else hops[0], 0)
        if (scheme := headers.get("x-forwarded-proto", "").strip().lower()) in ("http", "https"):
            seen["scheme"] = scheme
        host = _with_port(headers.get("x-forwarded-host", "").strip() or headers.get("host", ""), headers)
        if host:
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            seen["headers"] = [(b"host", host.encode("latin-1")), *others]
        state["forwarded"] = False  # what it says is believed, so the client is the one it names
        return seen

    def _trusts(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(ip, "ipv4_mapped", None)
        return any((mapped or ip) in network for network in self.trusted)


def _with_port(host: str, headers: Headers) -> str:
    """The host with the forwarded port: some proxies pass the name alone. The ports of http and https go unsaid."""
    port = headers.get("x-forwarded-port", "").strip()
    unsaid = not (port.isascii() and port.isdigit()) or port in ("80", "443")
    return host if unsaid or not host or ":" in host.rpartition("]")[2] else f"{host}:{port}"
