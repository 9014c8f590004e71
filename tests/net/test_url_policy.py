"""Which addresses a URL may refer to. No socket is opened here."""

from __future__ import annotations

import ipaddress

import pytest

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.net.public_ip import is_public
from stable_diffusion_server.net.url_policy import MAX_URL_LENGTH, AllowedTarget, UrlTarget, parse_url

CLOSED = (
    "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 "
    "192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 "
    ":: ::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 100::1 2001:db8::1 3fff::1 "
    # The same inside IPv6 transition forms: mapped, compatible, NAT64, local NAT64, 6to4, Teredo, ISATAP.
    "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: "
    "2002:a00:1:: 2001:0:a00:1::1 2001:0:808:808:0:0:f5ff:fffe 2606:4700::5efe:a00:1 2606:4700::200:5efe:7f00:1 "
    # Translated (SIIT), unassigned by IANA, private addresses that embed a public one. Metadata services of clouds:
    # Azure, AWS, Google, Oracle, Alibaba; and Azure's inside transition forms.
    "168.63.129.16 169.254.170.2 fd20:ce::254 192.0.0.192 100.100.100.200 ::ffff:168.63.129.16 64:ff9b::a83f:8110 "
    "2002:a83f:8110::1 2606:4700::5efe:a83f:8110 2001:0:a83f:8110::1 "
    # Sinks (AS112), relays (AMT), other special purposes, and unassigned networks.
    "192.31.196.1 192.52.193.1 192.175.48.1 2620:4f:8000::1 2001:1::1 2001:3::1 2001:4:112::1 2001:30::1 2001:1ff::1 "
    "2000::7f00:1 2000::1 2100::1 2500::1 3000::1 3ffe::1 "
    "::ffff:0:7f00:1 ::ffff:0:808:808 ::2 4000::1 8000::1 2001:20::1 fd00::5efe:808:808 fe80::5efe:808:808"
).split()
OPEN = (
    "8.8.8.8 93.184.216.34 168.63.129.15 168.63.129.17 172.32.0.1 2001:200::1 2001:4860:4860::8888 2003::1 2600::1 "
    "2a00::1 2c0f::1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"
).split()


@pytest.mark.fault(33, 34, 172)
@pytest.mark.parametrize("address", CLOSED)
def test_no_address_inside_is_public_in_any_disguise(address: str) -> None:
    """Loopback, private, link-local, reserved, and each of them inside an IPv6 transition form."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OPEN)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    """Also inside a transition form."""
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.fault(33, 38)
@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.png",
        "//a.example/x.png",
        "file:///etc/passwd",
        "gopher://a.example/",
        "ftp://a.example/x.png",
        "data:image/png;base64,AAAA",
        "http://",
        "http:///x.png",
        "http://user@a.example/x.png",
        "http://user:secret@a.example/x.png",
        "http://@a.example/",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://a .example/",
        "http://a.example/x y.png",
        "http://a.example\\@b.example/",
        "http://a.example/\r\nHost: b",
        "http://[::1%25eth0]/",
        "http://[::1/",
        "http://a..example/",
        "http://a%2eexample/",
        "http://2130706433/",
        "http://0x7f.0.0.1/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://1.2.3.4.5/",
        "http://" + "a" * 64 + ".example/",
    ],
)
def test_a_malformed_or_foreign_address_is_refused_by_name(url: str) -> None:
    """Other schemes, user info, odd ports, blanks, and number spellings that programs parse differently."""
    with pytest.raises(InvalidInput) as refused:
        parse_url(url, "image_url")
    assert refused.value.field == "image_url"


def test_the_longest_address_is_taken_and_one_character_more_is_not() -> None:
    """The maximum length is accepted."""
    url = "http://a.example/".ljust(MAX_URL_LENGTH, "x")
    parse_url(url, "image_url")
    with pytest.raises(InvalidInput):
        parse_url(url + "x", "image_url")


@pytest.mark.parametrize(
    ("url", "target", "again"),
    [
        ("http://A.Example/x.png", UrlTarget("http", "a.example", 80, "/x.png"), "http://a.example/x.png"),
        ("https://a.example", UrlTarget("https", "a.example", 443, "/"), "https://a.example/"),
        (
            "https://a.example:8443/?q=1#f",
            UrlTarget("https", "a.example", 8443, "/?q=1"),
            "https://a.example:8443/?q=1",
        ),
        ("http://[2001:DB8::1]/", UrlTarget("http", "2001:db8::1", 80, "/"), "http://[2001:db8::1]/"),
        ("http://bücher.example/ü%20.png", UrlTarget("http", "xn--bcher-kva.example", 80, "/%C3%BC%20.png"), None),
        # Full-width digits are normalised before the check.
        ("http://①②⑦.⓪.⓪.①/", UrlTarget("http", "127.0.0.1", 80, "/"), "http://127.0.0.1/"),
        ("http://127.0.0.1./", UrlTarget("http", "127.0.0.1", 80, "/"), "http://127.0.0.1/"),
    ],
)
def test_an_address_is_taken_apart_once_and_for_all(url: str, target: UrlTarget, again: str | None) -> None:
    """The checked URL is the one connected to: parsed once, ASCII, lower case, without fragment."""
    assert parse_url(url, "image_url") == target
    assert again is None or target.url == again


@pytest.mark.parametrize(
    ("text", "url", "address", "covered"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000/", "127.0.0.1", True),
        ("127.0.0.1:9000", "http://127.0.0.1:9001/", "127.0.0.1", False),
        ("127.0.0.1", "http://127.0.0.1/", "127.0.0.1", True),
        ("127.0.0.1", "http://127.0.0.1:9000/", "127.0.0.1", False),
        ("127.0.0.1", "http://127.0.0.1:443/", "127.0.0.1", False),
        ("10.0.0.0/8", "http://inside.example/", "10.2.3.4", True),
        ("10.0.0.0/8", "http://inside.example/", "192.168.0.1", False),
        ("[::1]:9000", "http://[::1]:9000/", "::1", True),
        ("images.internal", "https://images.internal/x", "10.0.0.1", True),
        ("images.internal:8080", "http://images.internal:8080/x", "10.0.0.1", True),
        ("images.internal", "https://images.internal.evil.example/x", "10.0.0.1", False),
    ],
)
def test_what_the_operator_allows_is_covered_and_nothing_beside_it(
    text: str, url: str, address: str, covered: bool
) -> None:
    """A name or a network, at its port or the scheme's default port."""
    assert AllowedTarget.parse(text).covers(parse_url(url, "image_url"), ipaddress.ip_address(address)) is covered


@pytest.mark.parametrize("text", ["", "http://a.example", "a.example/x", "u@a.example", "a.example:x", "10.0.0.1/8"])
def test_an_allowance_that_is_no_host_or_network_is_refused(text: str) -> None:
    """A typing error must not silently allow more, or nothing."""
    with pytest.raises(ValueError, match=r"."):
        AllowedTarget.parse(text)
