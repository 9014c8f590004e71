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
        "::/128 ::1/128 64:ff9b:1::/48 100::/64 2001:2::/48 2001:10::/28 2001:db8::/32 3fff::/20 5f00::/16 fc00::/7 "
        "fe80::/10 fec0::/10 ff00::/8"
    ).split()
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: Address) -> bool:
    """Whether an address is of the public internet; one that carries another in itself must carry a public one."""
    if address.is_multicast or any(address in network for network in _CLOSED):
        return False
    if isinstance(address, ipaddress.IPv6Address) and (carried := _carried(address)):
        return all(is_public(inner) for inner in carried)
    return address.is_global


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
