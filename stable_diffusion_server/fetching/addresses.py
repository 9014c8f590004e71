"""Which IP addresses are of the public internet, and which only look so. Pure tables; knows no URLs."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Addresses that are not of the public internet, whatever the running Python's own tables say.
_CLOSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        "2001:2::/48 2001:10::/28 2001:20::/28 2001:db8::/32 3fff::/20"
    ).split()
)
# What IANA has given out of IPv6 for the internet. Beyond it lie loopback, link-local, private and unknown forms, and
# three that stand for an IPv4 address alone: mapped, compatible, NAT64 (RFC 6052).
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_V4_ALONE = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::/96", "64:ff9b::/96")))
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet; one that carries another in itself must carry a public one."""
    if address.is_multicast or any(address in network for network in _CLOSED):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global
    if any(address in network for network in _V4_ALONE):
        return is_public(_last_of(address))
    carried = _carried(address)
    return address in _GLOBAL_UNICAST and (all(map(is_public, carried)) if carried else address.is_global)


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses inside those of 6to4, Teredo (server and client) and ISATAP."""
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    return [_last_of(address)] if int(address) >> 32 & 0xFFFFFFFF in _ISATAP else []


def _last_of(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
