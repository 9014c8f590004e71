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
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        # IANA's special-purpose blocks within 2001::/23 but Teredo (2001::/32), whose parts are looked at below.
        "2001:1::/32 2001:2::/31 2001:4::/30 2001:8::/29 2001:10::/28 2001:20::/27 2001:40::/26 2001:80::/25 "
        "2001:100::/24 2001:db8::/32 2620:4f:8000::/48 3fff::/20 "
        # The metadata service of Azure (WireServer), which answers from within each virtual machine alone. Those of
        # the other clouds are link-local, private or in 100.64.0.0/10 and 192.0.0.0/24, and closed above.
        "168.63.129.16/32"
    ).split()
)
# The /8 and /16 blocks of IPv6 from which IANA has given out networks (registry "IPv6 Global Unicast Address
# Assignments"). Beyond them lie loopback, link-local, private, unknown and unassigned forms, and three that stand for
# an IPv4 address alone: mapped, compatible, NAT64 (RFC 6052).
_GLOBAL_UNICAST = tuple(
    map(ipaddress.IPv6Network, "2001::/16 2002::/16 2003::/16 2400::/8 2600::/8 2800::/8 2a00::/8 2c00::/8".split())
)
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
    assigned = any(address in network for network in _GLOBAL_UNICAST)
    return assigned and (all(map(is_public, carried)) if carried else address.is_global)


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses inside those of 6to4, Teredo (server and client) and ISATAP."""
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    return [_last_of(address)] if int(address) >> 32 & 0xFFFFFFFF in _ISATAP else []


def _last_of(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
