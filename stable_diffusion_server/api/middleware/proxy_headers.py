"""Reads client, scheme and host of a request from the headers of a trusted proxy."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

# Headers that proxies, load balancers and CDNs add. Clients on this machine send none of them.
_FORWARDING = re.compile(
    rb"via|forwarded.*|x-forwarded.*|x-original-.*|(x-|true-|wl-proxy-|ali-cdn-|incap-|x-sucuri-|x-cluster-|x-proxyuser-)"
    rb"?(real-|client-?|remote-|originating-)ip|x-real-.*|x-client-.*|x-remote-.*|x-proxy-.*|x-scheme|x-nginx-.*"
    rb"|cf-.*|cdn-.*|fastly-.*|fly-.*|akamai-.*|x-akamai-.*|x-azure-.*|x-arr-.*|x-fd-.*|x-amzn-.*|x-amz-cf-.*"
    rb"|cloudfront-.*|x-appengine-.*|x-cloud-trace-context|x-envoy-.*|x-vercel-.*|x-nf-.*|x-varnish|x-haproxy-.*"
    rb"|x-traefik-.*|x-coming-from|x-request-start|tailscale-.*|ngrok-.*|x-ngrok-.*|proxy-.*|max-forwards"
)
# A proxy that adds no headers may still show by an old HTTP version; nginx uses one by default.
_OLD_VERSIONS = ("0.9", "1.0")
_HOP = re.compile(r"\[(?P<v6>[0-9A-Fa-f:.]+)\](:\d{1,5})?|(?P<v4>[0-9.]+):\d{1,5}")
_LOOPBACK = "127.0.0.1"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The networks of trusted proxies."""

    trusted: tuple[Network, ...] = ()

    def seen_through(self, scope: Scope, receive: Receive | None = None) -> Scope:
        """Return the scope of a request as the client sent it, if the connection comes from a trusted proxy.

        Reads the address of the connection from the transport behind `receive`, because the ASGI server may have
        replaced it by an address in a header, as uvicorn does by default.

        The client becomes the last address that is not a trusted proxy; scheme and Host header become those the client
        used, with the port in `X-Forwarded-Port` if the host has none. `state.forwarded` is true for a request that
        came through an untrusted proxy, or through one that does not name the client.
        """
        scope = _as_connected(scope, receive)
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        old = scope.get("http_version") in _OLD_VERSIONS
        state["forwarded"] = old or any(_FORWARDING.fullmatch(name.lower()) for name, _ in scope["headers"])
        client = scope.get("client")
        if not client or not self._trusts(client[0]):
            return scope
        seen = {**scope}
        hops = [_address_in(hop) for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
        if hops:
            # The last address that is not a trusted proxy. Clients can forge those before it.
            at = next((number for number in reversed(range(len(hops))) if not self._trusts(hops[number])), 0)
            seen["client"] = (hops[at], 0)
            # Local only if all hops are local: loopback in a header of another machine means that machine.
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
    """Return the address of a hop without the port that some proxies add (Azure), which differs by connection."""
    match = _HOP.fullmatch(hop.strip())
    return (match["v6"] or match["v4"]) if match else hop.strip()


def _is_loopback(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address == "localhost"
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _with_port(host: str, headers: Headers) -> str:
    """Return the host with `X-Forwarded-Port`, which some proxies send separately; omits default ports."""
    port = headers.get("x-forwarded-port", "").strip()
    omitted = not (port.isascii() and port.isdigit()) or port in ("80", "443")
    return host if omitted or not host or ":" in host.rpartition("]")[2] else f"{host}:{port}"


def _as_connected(scope: Scope, receive: Receive | None) -> Scope:
    """Return the scope with the connection's own client and scheme, not those the ASGI server read from headers."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if (extra_info := getattr(transport, "get_extra_info", None)) is not None:
        peer = extra_info("peername")
        client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple | list) and len(peer) > 1 else None
        return {**scope, "client": client, "scheme": "https" if extra_info("sslcontext") else "http"}
    client = scope.get("client")
    if client and not client[1] and any(name.lower() == b"x-forwarded-for" for name, _ in scope["headers"]):
        # Port 0 shows that the ASGI server took the address from a header, so the connection is from this machine.
        return {**scope, "client": (_LOOPBACK, 0), "scheme": "http"}
    return scope
