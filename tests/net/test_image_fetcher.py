"""The image fetcher against a misbehaving loopback server, with a fake resolver."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fakes import until
from misbehaving_server import PICTURE, FakeResolver, MisbehavingServer

from stable_diffusion_server.errors import InvalidInput, RemoteFetchFailed, ServerError, TooLarge, UnsupportedMedia
from stable_diffusion_server.net.image_fetcher import MAX_REDIRECTS, FetchLimits, ImageFetcher
from stable_diffusion_server.net.url_policy import AllowedTarget

pytestmark = pytest.mark.slow

MAX_BYTES = 100_000


@pytest.fixture
async def site() -> AsyncIterator[MisbehavingServer]:
    """The misbehaving server."""
    site = MisbehavingServer()
    server = await site.start()
    yield site
    server.close()
    await asyncio.to_thread(until, lambda: not site.open)


@pytest.fixture
async def fetch(site: MisbehavingServer) -> AsyncIterator[Callable[[str], Awaitable[bytes]]]:
    """Fetch a path of the misbehaving server, which is allowed, within tight bounds."""
    bounds = FetchLimits(max_bytes=MAX_BYTES, total=3.0, connect=1.0, first_byte=0.5, min_rate=1024, grace=0.2)
    fetcher = ImageFetcher(
        bounds, [AllowedTarget.parse(f"pictures.test:{site.port}")], FakeResolver(pictures_test=["127.0.0.1"])
    )
    yield lambda path: fetcher.fetch(f"http://pictures.test:{site.port}/{path}", "image_url")
    fetcher.close()


@pytest.mark.parametrize("path", ["picture", "chunked", "until-close", f"hops/{MAX_REDIRECTS}", f"size/{MAX_BYTES}"])
async def test_a_picture_is_fetched_however_it_is_sent(fetch: Callable[[str], Awaitable[bytes]], path: str) -> None:
    """With Content-Length, chunked, until close, after the maximum number of redirects, and at the byte limit."""
    assert (await fetch(path)).startswith(PICTURE)


@pytest.mark.fault(36, 37)
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("html", UnsupportedMedia),
        ("status/404", RemoteFetchFailed),
        ("status/500", RemoteFetchFailed),
        ("status/206", RemoteFetchFailed),
        ("gzip", RemoteFetchFailed),
        ("gzip-bomb", RemoteFetchFailed),
        ("gzip-transfer", RemoteFetchFailed),
        ("headers", RemoteFetchFailed),
        ("interim", RemoteFetchFailed),
        ("circle", RemoteFetchFailed),
        ("length/-1", RemoteFetchFailed),
        ("length/1e3", RemoteFetchFailed),
        ("length/huge", RemoteFetchFailed),
        ("length/200,300", RemoteFetchFailed),
        ("short", RemoteFetchFailed),
        ("garbage", RemoteFetchFailed),
        ("silent", RemoteFetchFailed),
        ("drip", RemoteFetchFailed),
        ("nowhere", RemoteFetchFailed),
        (f"hops/{MAX_REDIRECTS + 1}", RemoteFetchFailed),
        (f"size/{MAX_BYTES + 1}", TooLarge),
        ("endless", TooLarge),
        ("to/http://127.0.0.1/", InvalidInput),
        ("to/http://[::1]/", InvalidInput),
        ("to/http://169.254.169.254/latest/meta-data", InvalidInput),
        ("to/http://pictures.test:1/", InvalidInput),
        ("to/http://inside.test/", InvalidInput),
        ("to/file:///etc/passwd", InvalidInput),
        ("to/gopher://pictures.test/", InvalidInput),
        ("to///127.0.0.1/", InvalidInput),
        ("to/http://[::1", RemoteFetchFailed),
        ("to///[x]/", RemoteFetchFailed),
        ("to/http://a:b@pictures.test/", InvalidInput),
        ("to-long", InvalidInput),
    ],
)
async def test_a_bad_answer_is_a_named_error(
    fetch: Callable[[str], Awaitable[bytes]], path: str, error: type[ServerError]
) -> None:
    """Not an image, not 200, compressed, aborted, silent, slow, endless, redirecting to private.

    An error, not a hang.
    """
    async with asyncio.timeout(20):
        with pytest.raises(error) as failed:
            await fetch(path)
    assert failed.value.field == "image_url"


@pytest.mark.fault(35)
async def test_the_name_is_resolved_once_and_kept_for_the_host_header(site: MisbehavingServer) -> None:
    """There is no second DNS lookup, so the address cannot become private between check and connect (DNS rebinding)."""
    names = FakeResolver(pictures_test=["127.0.0.1"])
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), [AllowedTarget.parse(f"pictures.test:{site.port}")], names)
    await fetcher.fetch(f"http://pictures.test:{site.port}/picture", "image_url")
    fetcher.close()
    assert names.asked == ["pictures.test"]
    (head,) = site.heads
    assert f"host: pictures.test:{site.port}" in head.lower()
    assert "accept-encoding: identity" in head.lower()
    assert "sec-fetch-site: cross-site" in head.lower()


async def test_no_cookie_is_carried_from_hop_to_hop_or_to_the_next_caller(
    site: MisbehavingServer, fetch: Callable[[str], Awaitable[bytes]]
) -> None:
    """Every response sets a cookie, and no request sends one."""
    await fetch("hops/2")
    await fetch("picture")
    assert len(site.heads) == 4
    assert not any("cookie:" in head.lower() for head in site.heads)


@pytest.mark.fault(33, 34)
@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],
        ["93.184.216.34", "::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
        ["64:ff9b::a9fe:a9fe"],
        ["not an address"],
        [],
    ],
)
async def test_a_name_with_any_closed_address_is_refused_before_dialling(
    site: MisbehavingServer, answers: list[str]
) -> None:
    """One private address among public ones is enough; no connection is made."""
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), resolve=FakeResolver(pictures_test=answers))
    with pytest.raises(InvalidInput) as refused:
        await fetcher.fetch("http://pictures.test/picture", "image_url")
    fetcher.close()
    assert refused.value.field == "image_url"
    assert site.heads == []


async def test_a_name_that_is_not_there_is_answered_like_one_inside() -> None:
    """The error does not reveal which names exist in the operator's network."""
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), resolve=FakeResolver(inside_test=["10.0.0.1"]))
    details = []
    for host in ("inside.test", "nowhere.test"):
        with pytest.raises(InvalidInput) as refused:
            await fetcher.fetch(f"http://{host}/", "image_url")
        details.append(refused.value.detail)
    fetcher.close()
    assert details[0] == details[1]


@pytest.mark.fault(38)
async def test_a_public_address_at_an_odd_port_is_refused() -> None:
    """Mail, ssh and databases get no requests."""
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), resolve=FakeResolver(pictures_test=["93.184.216.34"]))
    for port in (0, 22, 25, 5432, 8080):
        with pytest.raises(InvalidInput):
            await fetcher.fetch(f"http://pictures.test:{port}/", "image_url")
    fetcher.close()


@pytest.mark.fault(33)
async def test_the_system_resolver_finds_localhost_and_it_is_refused(site: MisbehavingServer) -> None:
    """Without a custom resolver names use the system's, and loopback is still refused."""
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES))
    for host in ("localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"):
        with pytest.raises(InvalidInput):
            await fetcher.fetch(f"http://{host}/picture", "image_url")
    fetcher.close()
    assert site.heads == []


@pytest.mark.fault(38)
async def test_a_proxy_in_the_environment_is_not_used(
    site: MisbehavingServer, fetch: Callable[[str], Awaitable[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would connect for us, and not to the checked address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await fetch("picture") == PICTURE


async def test_tls_is_asked_for_the_name_and_not_the_number() -> None:
    """The connection is to the IP address, the certificate must match the name; without one nothing is fetched."""
    wanted: list[str | None] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.sni_callback = lambda connection, name, context: wanted.append(name)  # type: ignore[assignment]  # returns None
    site = MisbehavingServer()
    server = await site.start(tls)
    allowed = [AllowedTarget.parse(f"pictures.test:{site.port}")]
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), allowed, FakeResolver(pictures_test=["127.0.0.1"]))
    with pytest.raises(RemoteFetchFailed):
        await fetcher.fetch(f"https://pictures.test:{site.port}/picture", "image_url")
    fetcher.close()
    server.close()
    assert wanted == ["pictures.test"]


async def test_a_fetch_that_is_cancelled_lets_go_of_its_connection(
    site: MisbehavingServer,
) -> None:
    """The caller left: the remote sees the connection close."""
    fetcher = ImageFetcher(
        FetchLimits(MAX_BYTES, total=600, grace=600), [AllowedTarget.parse(f"127.0.0.1:{site.port}")]
    )
    fetching = asyncio.ensure_future(fetcher.fetch(f"http://127.0.0.1:{site.port}/drip", "image_url"))
    await asyncio.to_thread(until, lambda: bool(site.heads))
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    await asyncio.to_thread(until, lambda: not site.open)
    fetcher.close()


async def test_the_next_address_is_dialled_when_the_first_takes_no_connection(site: MisbehavingServer) -> None:
    """A name with one dead and one live address still yields its image."""
    names = FakeResolver(pictures_test=["127.9.9.9", "127.0.0.1"])
    fetcher = ImageFetcher(FetchLimits(MAX_BYTES), [AllowedTarget.parse(f"pictures.test:{site.port}")], names)
    assert await fetcher.fetch(f"http://pictures.test:{site.port}/picture", "image_url") == PICTURE
    fetcher.close()
