"""Decides whether an IP address is on the public internet, including addresses that embed another one."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Not on the public internet; listed here because the tables of `ipaddress` differ between Python versions.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
        # IANA's special-purpose blocks within 2001::/23 except Teredo (2001::/32), which is handled below.
        "2001:1::/32 2001:2::/31 2001:4::/30 2001:8::/29 2001:10::/28 2001:20::/27 2001:40::/26 2001:80::/25 "
        "2001:100::/24 2001:db8::/32 2620:4f:8000::/48 3fff::/20 "
        # Azure's metadata service (WireServer), reachable only from its virtual machines. The metadata services of
        # other clouds are link-local, private or in 100.64.0.0/10 and 192.0.0.0/24, which are listed above.
        "168.63.129.16/32"
    ).split()
)
# The IPv6 blocks that IANA has assigned ("IPv6 Global Unicast Address Assignments"). All others are loopback,
# link-local, private or unassigned, or represent one IPv4 address: mapped, compatible, NAT64 (RFC 6052).
_GLOBAL_UNICAST = tuple(
    map(ipaddress.IPv6Network, "2001::/16 2002::/16 2003::/16 2400::/8 2600::/8 2800::/8 2a00::/8 2c00::/8".split())
)
_IPV4_ONLY = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::/96", "64:ff9b::/96")))
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; an IPv4 address embedded in it must be public too."""
    if address.is_multicast or any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global
    if any(address in network for network in _IPV4_ONLY):
        return is_public(_low_32_bits(address))
    embedded = _embedded_ipv4(address)
    assigned = any(address in network for network in _GLOBAL_UNICAST)
    return assigned and (all(map(is_public, embedded)) if embedded else address.is_global)


def _embedded_ipv4(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses embedded in a 6to4, Teredo (server and client) or ISATAP address."""
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    return [_low_32_bits(address)] if int(address) >> 32 & 0xFFFFFFFF in _ISATAP else []


def _low_32_bits(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
