"""Hostile URLs through the real routes.

Refused, and no forbidden address is connected to, as recorded at the sockets.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningApp, free_port
from fakes import FakeDenoiser, FakeImageDenoiser, until
from live_servers import LiveServer
from misbehaving_server import PICTURE, MisbehavingServer, serve_in_thread
from outbound_connections import OutboundConnections, Trap, recording
from storage_servers import MisbehavingStore as StorageRascal
from storage_servers import StorageServer, make_s3_bucket, s3_client

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.net import image_fetcher, safe_client
from stable_diffusion_server.net.image_fetcher import FetchLimits, ImageFetcher
from stable_diffusion_server.net.url_policy import PORTS, AllowedTarget, parse_url, redirect_target

pytestmark = pytest.mark.slow

STYLE = "/style_transfer_and_upload_image"
PUBLIC = "93.184.216.34"
NAMES: dict[str, list[list[str]]] = {
    "pictures.test": [["127.0.0.1"]],
    "xn--bcher-kva.test": [["127.0.0.1"]],
    "public.test": [[PUBLIC]],
    "localhost": [["127.0.0.1", "::1"]],
    "localtest.me": [["127.0.0.1"]],
    "127.0.0.1.nip.io": [["127.0.0.1"]],
    "metadata.google.internal": [["169.254.169.254"]],
    "inside.test": [["10.0.0.7"]],
    "both.test": [[PUBLIC, "127.0.0.1"]],
    "six.test": [["::1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "nat64.test": [["64:ff9b::7f00:1"]],
    "zone.test": [["fe80::1%lo"]],
    # Public on the first lookup and private on later ones; and the reverse.
    "turns.test": [[PUBLIC], ["127.0.0.1"]],
    "turns-back.test": [["127.0.0.1"], [PUBLIC]],
}

# Each leads to the trap on this machine, to another private address, or nowhere.
SPELLINGS = """
http://127.0.0.1/ http://127.0.0.2/ http://127.255.255.254/ http://0.0.0.0/ http://0/ http://localhost/ http://LOCALHOST/
http://localhost./ http://127.0.0.1./ http://127.1/ http://127.0.1/ http://2130706433/ http://0x7f000001/
http://0x7f.0.0.1/ http://0177.0.0.1/ http://017700000001/ http://00000177.0.0.1/ http://127.0.0.1%00.public.test/
http://①②⑦.⓪.⓪.①/ http://127。0。0。1/ http://127.0.0.1:{trap}/ http://localhost:{trap}/ http://[::1]:{trap}/
http://[::1]/ http://[::]/ http://[0:0:0:0:0:0:0:1]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/
http://[::127.0.0.1]/ http://[::ffff:0:127.0.0.1]/ http://[64:ff9b::127.0.0.1]/ http://[64:ff9b::a9fe:a9fe]/
http://[64:ff9b:1::7f00:1]/ http://[2002:7f00:1::]/ http://[2002:a9fe:a9fe::]/ http://[2001:0:7f00:1::1]/
http://[2001:0:808:808::80ff:fffe]/ http://[2606:4700::5efe:127.0.0.1]/ http://[fe80::1]/ http://[fe80::1%25lo]/
http://[fd00:ec2::254]/ http://[fec0::1]/ http://[ff02::1]/ http://[::ffff:169.254.169.254]/
http://169.254.169.254/latest/meta-data/ http://10.0.0.1/ http://172.16.0.1/ http://192.168.0.1/ http://100.64.0.1/
http://192.0.0.1/ http://198.18.0.1/ http://224.0.0.1/ http://255.255.255.255/ http://localtest.me/
http://127.0.0.1.nip.io/ http://metadata.google.internal/computeMetadata/v1/ http://inside.test/ http://both.test/
http://six.test/ http://mapped.test/ http://nat64.test/ http://zone.test/ http://nowhere.test/ https://localhost/
https://127.0.0.1/ http://user@127.0.0.1/ http://user:word@pictures.test:{friend}/picture
http://pictures.test:{friend}@127.0.0.1/ http://127.0.0.1@public.test/ http://pictures.test:{friend}\\@127.0.0.1/
http://127.0.0.1#@public.test/ http://127.0.0.1?@public.test/ http://public.test:22/ http://public.test:25/
http://public.test:6379/ http://public.test:0/ http://public.test:8080/ http://pictures.test:22/ http:///127.0.0.1/
http:127.0.0.1 //127.0.0.1/ file:///etc/passwd file://127.0.0.1/etc/passwd gopher://127.0.0.1:{trap}/_x
ftp://127.0.0.1/ dict://127.0.0.1:{trap}/ ldap://127.0.0.1/ ws://127.0.0.1/ unix:///run/docker.sock
jar:http://127.0.0.1!/ http+unix://%2Frun%2Fdocker.sock/
""".split()
# The first hop is allowed; its redirect target is not.
HOPS = """
to/http://127.0.0.1/ to/http://127.0.0.2:{friend}/picture to/http://[::1]/ to/http://169.254.169.254/ to///127.0.0.1/
to/http://inside.test/ to/http://both.test/ to/http://[64:ff9b::7f00:1]/ to/http://2130706433/ to/file:///etc/passwd
to/gopher://127.0.0.1:{trap}/_x to/http://a:b@pictures.test:{friend}/picture to/http://pictures.test:22/
to/http://[::1 to-long circle hops/4 nowhere
""".split()
HOSTILE = [*SPELLINGS, *(f"http://pictures.test:{{friend}}/{path}" for path in HOPS), "http://turns.test/"]
FRIENDLY = """
http://pictures.test:{friend}/picture http://127.0.0.1:{friend}/picture http://BÜCHER.test:{friend}/picture
http://pictures.test:{friend}/hops/2 http://pictures.test:{friend}/to/http://127.0.0.1:{friend}/chunked
http://pictures.test.:{friend}/until-close
""".split()


@pytest.fixture
def friend() -> Iterator[MisbehavingServer]:
    """The only server that may be connected to."""
    with serve_in_thread(MisbehavingServer()) as site:
        yield site


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, trap: Trap) -> OutboundConnections:
    """The table replaces DNS; the trap listens on http's port, so only the URL rules protect it."""
    connections = OutboundConnections({name: [list(answer) for answer in answers] for name, answers in NAMES.items()})
    monkeypatch.setattr("socket.getaddrinfo", connections.resolve)
    monkeypatch.setitem(PORTS, "http", trap.port)
    # httpx strips the default port itself.
    monkeypatch.setattr(
        safe_client, "authority", lambda host, port, _: f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    )
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
    return connections


@pytest.fixture
def running_app(run_app: Callable[..., RunningApp], friend: MisbehavingServer) -> RunningApp:
    """A running app that may fetch from the allowed server, by two names and its IP address."""
    hosts = ("pictures.test", "pictures.test.", "xn--bcher-kva.test", "127.0.0.1")
    return run_app(FakeImageDenoiser(), fetch_allow=",".join(f"{host}:{friend.port}" for host in hosts))


def filled(url: str, friend: MisbehavingServer, trap: Trap) -> str:
    return url.replace("{friend}", str(friend.port)).replace("{trap}", str(trap.port))


@pytest.mark.fault(33, 34, 35, 36, 38)
def test_no_hostile_address_is_dialled(
    running_app: RunningApp, friend: MisbehavingServer, trap: Trap, connections: OutboundConnections
) -> None:
    """Each is refused by its parameter.

    The sockets saw only the allowed server, and the public answer of a rebinding name.
    """
    assert len(HOSTILE) >= 100
    with recording(connections):
        for url in HOSTILE:
            asked = {"prompt": "a red square", "image_url": filled(url, friend, trap)}
            answer = running_app.client.post(STYLE, json=asked)
            assert answer.status_code in (422, 502), (url, answer.text)
            assert answer.json()["field"] == "image_url", url
    assert set(connections.dialled) == {("127.0.0.1", friend.port), (PUBLIC, trap.port)}
    assert connections.dialled.count((PUBLIC, trap.port)) == 1, "the name that turns, at its public address"
    assert trap.came == []
    assert running_app.squares.prepared == []


@pytest.mark.fault(33, 36)
def test_friendly_addresses_are_fetched_all_the_same(
    running_app: RunningApp, friend: MisbehavingServer, trap: Trap, connections: OutboundConnections
) -> None:
    """By name, by IP, internationalised, with a trailing dot, through redirects: what the operator allows."""
    assert len(FRIENDLY) >= 5
    with recording(connections):
        for url in FRIENDLY:
            asked = {"prompt": "a red square", "image_url": filled(url, friend, trap), "overwrite": True}
            assert running_app.client.post(STYLE, json=asked).status_code == 200, url
    assert set(connections.dialled) == {("127.0.0.1", friend.port)}
    assert trap.came == []


@pytest.mark.fault(33, 34, 38)
def test_no_webhook_leads_inside_either(
    running_app: RunningApp, friend: MisbehavingServer, trap: Trap, connections: OutboundConnections
) -> None:
    """The same URLs as `webhook_url`: refused on submission, or at delivery."""
    with recording(connections):
        for url in SPELLINGS:
            asked = {"prompt": "a red square", "width": 64, "height": 64, "webhook_url": filled(url, friend, trap)}
            answer = running_app.client.post(
                "/create_and_upload_image", json=asked, headers={"Prefer": "respond-async"}
            )
            assert (answer.status_code, answer.json()["field"]) == (422, "webhook_url"), url
    assert connections.dialled == []
    assert trap.came == []


@pytest.mark.fault(35)
def test_a_webhook_whose_name_turns_private_is_not_sent(
    running_app: RunningApp, trap: Trap, connections: OutboundConnections
) -> None:
    """Public when the job is accepted, private when it ends: the job is done, and no connection is made."""
    asked = {"prompt": "a red square", "width": 64, "height": 64, "webhook_url": "http://turns.test/hook"}
    with recording(connections):
        answer = running_app.client.post("/create_and_upload_image", json=asked, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        until(lambda: running_app.client.get(f"/jobs/{answer.json()['id']}").json()["state"] == "done")
        until(lambda: connections.asked.count("turns.test") >= 2)
    assert connections.dialled == []
    assert trap.came == []


@pytest.mark.fault(35)
async def test_every_hop_is_resolved_and_checked_again(
    friend: MisbehavingServer, trap: Trap, connections: OutboundConnections
) -> None:
    """A name whose network is allowed on the first hop and not on the second is refused."""
    allowed = [AllowedTarget.parse(f"127.0.0.1:{friend.port}")]
    fetching = ImageFetcher(FetchLimits(100_000), allowed)
    url = f"http://turns-back.test:{friend.port}"
    with recording(connections), pytest.raises(InvalidInput):
        await fetching.fetch(f"{url}/to/{url}/picture", "image_url")
    fetching.close()
    assert connections.asked == ["turns-back.test"] * 2
    assert connections.dialled == [("127.0.0.1", friend.port)]


async def test_without_the_rules_the_trap_would_have_caught_them(
    monkeypatch: pytest.MonkeyPatch, trap: Trap, connections: OutboundConnections
) -> None:
    """Proves that the two tests above can fail: with every address public, the sockets would have seen the trap."""
    monkeypatch.setattr(safe_client, "is_public", lambda address: True)
    fetching = ImageFetcher(FetchLimits(100_000))
    spellings = ["http://127.0.0.1/", "http://[::ffff:127.0.0.1]/", "http://127.0.0.1.nip.io/", "http://127.0.0.1./"]
    with recording(connections):
        for url in spellings:
            with pytest.raises(image_fetcher.RemoteFetchFailed):
                await fetching.fetch(url, "image_url")
    fetching.close()
    assert len(connections.dialled) == len(spellings)
    until(lambda: len(trap.came) >= 3)


def test_where_a_redirect_leads_is_read_like_any_address() -> None:
    """An invalid URL, and a redirect from https to http, are refused by name."""
    for location in ("http://[::1", "//[x]/", "http://public.test/", "http:///"):
        with pytest.raises(InvalidInput) as refused:
            redirect_target(parse_url("https://public.test/", "image_url"), location, "image_url")
        assert refused.value.field == "image_url"


@pytest.mark.fault(36)
async def test_tls_is_checked_and_never_left(tmp_path: Path) -> None:
    """The certificate must match the name; a redirect from https to http is not followed."""
    server_side, client_side = tls_for("pictures.test", tmp_path)
    with serve_in_thread(MisbehavingServer(), server_side) as secure:
        hosts = [AllowedTarget.parse(f"{host}:{secure.port}") for host in ("pictures.test", "other.test")]

        async def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        fetching = ImageFetcher(FetchLimits(100_000), hosts, resolve)
        fetching._client._tls = client_side
        base = f"https://pictures.test:{secure.port}"
        assert await fetching.fetch(f"{base}/picture", "image_url") == PICTURE
        with pytest.raises(image_fetcher.RemoteFetchFailed):
            await fetching.fetch(f"https://other.test:{secure.port}/picture", "image_url")
        with pytest.raises(InvalidInput, match="from https to http"):
            await fetching.fetch(f"{base}/to/http://pictures.test:{secure.port}/picture", "image_url")
        fetching.close()


def tls_for(name: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Both sides of a connection to `name`, with a certificate for it that the client trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    written = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "tls.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain) + written)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(folder / "tls.pem")
    return server_side, ssl.create_default_context(cadata=written.decode())


@pytest.mark.fault(39)
def test_the_server_draws_nothing_for_itself(live_of: Callable[..., LiveServer]) -> None:
    """The server's own URL as image source: refused like all of loopback; if allowed, it generates nothing."""
    port = free_port()
    live = live_of(FakeImageDenoiser(), port=port, fetch_allow=f"127.0.0.1:{port}")
    source = f"{live.url}/make_image?prompt=a+green+square&width=64&height=64"
    asked = {"prompt": "a red square", "image_url": source}
    answer = httpx.post(f"{live.url}{STYLE}", json=asked, timeout=60)
    assert (answer.status_code, answer.json()["field"]) == (502, "image_url")
    assert "status 403" in answer.json()["detail"]
    other = httpx.post(f"{live.url}{STYLE}", json={**asked, "image_url": source.replace("127.0.0.1", "127.0.0.2")})
    assert (other.status_code, other.json()["field"]) == (422, "image_url")
    assert live.squares.prepared == []


@pytest.mark.fault(39)
def test_the_servers_storage_is_not_asked_with_its_keys(
    run_app: Callable[..., RunningApp],
    s3_server: StorageServer,
    rascal_before: Callable[[StorageServer], StorageRascal],
) -> None:
    """The bucket's endpoint is private like others; if allowed, the request carries no credentials."""
    name, rascal = make_s3_bucket(s3_server), rascal_before(s3_server)
    s3_client(s3_server.url).put_object(Bucket=name, Key="a.png", Body=PICTURE)
    storage = {"storage_provider": "r2", "r2_endpoint_url": rascal.url, "bucket_name": name}
    keys = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "sesame-open"}
    source = {"prompt": "a red square", "image_url": f"{rascal.url}/{name}/a.png"}

    closed = run_app(FakeImageDenoiser(), **storage, **keys)
    before = len(rascal.requests)
    answer = closed.client.post(STYLE, json=source)
    assert (answer.status_code, answer.json()["field"]) == (422, "image_url")
    assert not [path for _, path, _ in rascal.requests[before:] if path.endswith("a.png")]

    allowed = run_app(
        FakeImageDenoiser(), **storage, **keys, fetch_allow=f"127.0.0.1:{rascal.port}", data_dir=closed.folder / "two"
    )
    assert allowed.client.post(STYLE, json=source).status_code == 200
    asked = [headers for method, path, headers in rascal.requests if method == "GET" and path.endswith("a.png")]
    assert len(asked) == 1
    assert not {"authorization", "cookie", "x-amz-date"} & {header.lower() for header in asked[0]}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], int]] = {
    "a prompt over the limit": ({"prompt": "x" * 32_001}, {}, 422),
    "steps over the limit": ({"num_inference_steps": 10**9}, {}, 422),
    "a strength over the limit": ({"strength": 2}, {}, 422),
    "no step left": ({"strength": 0.01}, {}, 422),
    "a climbing name": ({"save_path": "a/../a.webp"}, {}, 422),
    "a name outside the key's part": ({"save_path": "b/a.webp"}, {}, 403),
    "an unknown model": ({"model": "gpt-7"}, {}, 422),
    "an unknown parameter": ({"widht": 64}, {}, 422),
    "no key": ({}, {"Authorization": ""}, 401),
    "a wrong key": ({}, {"Authorization": "Bearer wrong"}, 401),
    "another page": ({}, {"Origin": "https://evil.example"}, 403),
    "another host": ({}, {"Host": "evil.example"}, 421),
    "a prefetch": ({}, {"Sec-Purpose": "prefetch"}, 403),
}


@pytest.mark.parametrize("prefer", ["", "respond-async"])
def test_nothing_is_fetched_or_looked_up_before_limits_and_keys_are_checked(
    run_app: Callable[..., RunningApp], friend: MisbehavingServer, connections: OutboundConnections, prefer: str
) -> None:
    """A request refused for any other reason causes no DNS lookup, also not of its webhook.

    The rate limit comes last.
    """
    running_app = run_app(
        FakeImageDenoiser(),
        fetch_allow=f"pictures.test:{friend.port}",
        api_keys="ann:sesame;prefix=a/;rate=20/hour",
        jobs_max_queued=1000,
    )
    key = {"Authorization": "Bearer sesame", **({"Prefer": prefer} if prefer else {})}
    order = {"prompt": "a red square", "image_url": f"http://pictures.test:{friend.port}/picture"}
    if prefer:
        order["webhook_url"] = "http://public.test/"
    with recording(connections):
        for what, (change, headers, status) in REFUSED.items():
            answer = running_app.client.post(STYLE, json={**order, **change}, headers={**key, **headers})
            assert answer.status_code == status, (what, answer.text)
        while (answer := running_app.client.post(STYLE, json={**order, "prompt": ""}, headers=key)).status_code == 422:
            pass
        assert answer.status_code == 429
        assert running_app.client.post(STYLE, json=order, headers=key).status_code == 429
    assert (connections.asked, connections.dialled, friend.heads) == ([], [], [])


def test_a_server_that_goes_down_or_is_full_fetches_nothing(
    run_app: Callable[..., RunningApp], friend: MisbehavingServer, connections: OutboundConnections
) -> None:
    """A full queue is reported before any DNS lookup."""
    squares = FakeDenoiser(gate=threading.Event())
    assert squares.gate is not None
    running_app = run_app(
        squares, fetch_allow=f"pictures.test:{friend.port}", queue_limit=1, max_batch=1, jobs_concurrency=2
    )
    for prompt in ("one", "two"):
        running_app.client.post(
            "/create_and_upload_image",
            json={"prompt": prompt, "width": 64, "height": 64},
            headers={"Prefer": "respond-async"},
        )
    until(lambda: running_app.metric("sds_queue_waiting") == 1)
    order = {"prompt": "a red square", "image_url": f"http://pictures.test:{friend.port}/picture"}
    with recording(connections):
        assert running_app.client.post(STYLE, json=order).status_code == 429
    squares.gate.set()
    assert (connections.asked, friend.heads) == ([], [])
