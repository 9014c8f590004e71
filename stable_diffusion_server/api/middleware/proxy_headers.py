"""Who a request is from and what it was sent to, behind proxies: their headers count from those the settings name."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

# What proxies, balancers and content networks add to what they pass on; no client on this machine sends any of it.
_FORWARDING = re.compile(
    rb"via|forwarded.*|x-forwarded.*|x-original-.*|(x-|true-|wl-proxy-|ali-cdn-|incap-|x-sucuri-|x-cluster-|x-proxyuser-)"
    rb"?(real-|client-?|remote-|originating-)ip|x-real-.*|x-client-.*|x-remote-.*|x-proxy-.*|x-scheme|x-nginx-.*"
    rb"|cf-.*|cdn-.*|fastly-.*|fly-.*|akamai-.*|x-akamai-.*|x-azure-.*|x-arr-.*|x-fd-.*|x-amzn-.*|x-amz-cf-.*"
    rb"|cloudfront-.*|x-appengine-.*|x-cloud-trace-context|x-envoy-.*|x-vercel-.*|x-nf-.*|x-varnish|x-haproxy-.*"
    rb"|x-traefik-.*|x-coming-from|x-request-start|tailscale-.*|ngrok-.*|x-ngrok-.*|proxy-.*|max-forwards"
)
# A proxy that adds nothing at all still asks in the old version, as nginx does unless told otherwise.
_OLD = ("0.9", "1.0")
_HOP = re.compile(r"\[(?P<v6>[0-9A-Fa-f:.]+)\](:\d{1,5})?|(?P<v4>[0-9.]+):\d{1,5}")
_LOOPBACK = "127.0.0.1"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The proxies whose headers are believed."""

    trusted: tuple[Network, ...] = ()

    def seen_through(self, scope: Scope, receive: Receive | None = None) -> Scope:
        """The request as the proxies tell of it, when the connection comes from one of them; else as it is.

        Where it comes from is asked of the connection behind `receive`: what serves this application may have believed
        a header before, as uvicorn does by default.

        The client becomes the last address that is no trusted proxy's, the scheme and the Host header what the
        client used, with the port of `X-Forwarded-Port` where the name came without one. `state.forwarded` tells
        that a request came through a proxy that is not trusted, or through one that does not tell who asks.
        """
        scope = _as_connected(scope, receive)
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        old = scope.get("http_version") in _OLD
        state["forwarded"] = old or any(_FORWARDING.fullmatch(name.lower()) for name, _ in scope["headers"])
        client = scope.get("client")
        if not client or not self._trusts(client[0]):
            return scope
        seen = {**scope}
        hops = [_address_in(hop) for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
        if hops:
            # The last that is no trusted proxy's: what stands before it anyone may have sent.
            at = next((number for number in reversed(range(len(hops))) if not self._trusts(hops[number])), 0)
            seen["client"] = (hops[at], 0)
            # On this machine is only who is so by every hop; what another machine calls loopback is that machine.
            local = [_is_loopback(hop) for hop in (*hops[at:], client[0])]
            state["forwarded"] = local[0] and not all(local)
        if (scheme := headers.get("x-forwarded-proto", "").strip().lower()) in ("http", "https"):
            seen["scheme"] = scheme
        host = _with_port(headers.get("x-forwarded-host", "").strip() or headers.get("host", ""), headers)
        if host:
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            seen["headers"] = [(b"host", host.encode("latin-1")), *others]
        return seen

    def _trusts(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = getattr(ip, "ipv4_mapped", None)
        return any((mapped or ip) in network for network in self.trusted)


def _address_in(hop: str) -> str:
    """The address of a hop without its port, which some proxies write too (Azure's): each connection has another."""
    match = _HOP.fullmatch(hop.strip())
    return (match["v6"] or match["v4"]) if match else hop.strip()


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address == "localhost"
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _with_port(host: str, headers: Headers) -> str:
    """The host with the forwarded port: some proxies pass the name alone. The ports of http and https go unsaid."""
    port = headers.get("x-forwarded-port", "").strip()
    unsaid = not (port.isascii() and port.isdigit()) or port in ("80", "443")
    return host if unsaid or not host or ":" in host.rpartition("]")[2] else f"{host}:{port}"


def _as_connected(scope: Scope, receive: Receive | None) -> Scope:
    """The request with the client and the scheme of its own connection, whatever a server made of its headers."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if (told := getattr(transport, "get_extra_info", None)) is not None:
        peer = told("peername")
        client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple | list) and len(peer) > 1 else None
        return {**scope, "client": client, "scheme": "https" if told("sslcontext") else "http"}
    client = scope.get("client")
    if client and not client[1] and any(name.lower() == b"x-forwarded-for" for name, _ in scope["headers"]):
        # No connection has port 0: another process has put the address of a header there. It believes this machine.
        return {**scope, "client": (_LOOPBACK, 0), "scheme": "http"}
    return scope
