"""Forwarded headers count from TRUSTED_PROXIES only, with every server command: real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, free_port
from fakes import until

from stable_diffusion_server.api.middleware.proxy_headers import TrustedProxies

pytestmark = pytest.mark.slow

COMMANDS = {
    "uvicorn": ("-m", "uvicorn", "main:app", "--port"),
    "uvicorn that believes all": ("-m", "uvicorn", "main:app", "--forwarded-allow-ips", "*", "--port"),
    "serve": ("-m", "stable_diffusion_server", "serve"),
}


@contextmanager
def serving(folder: Path, command: str, **settings: str) -> Iterator[str]:
    """The URL of a server process that answers, ready or not."""
    port = free_port()
    words = (*COMMANDS[command], *([str(port)] if "uvicorn" in command else []))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PORT": str(port), "UI": "0", **settings}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # our own command, made here
            (sys.executable, *words),
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _answers(url) or process.poll() is not None, seconds=600)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def asked(url: str, **headers: str) -> int:
    """The response to a request without a prompt, which generates nothing."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/make_image", json={}, headers=sent, timeout=60).status_code


@pytest.mark.fault(148)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_header_makes_another_client_where_no_proxy_is_named(tmp_path: Path, command: str) -> None:
    """Eight forged addresses count as one client: the third request exceeds the rate."""
    with serving(tmp_path, command, RATE_LIMIT="3/hour", ALLOW_ANONYMOUS="1") as url:
        reported = [asked(url, x_forwarded_for=f"198.51.100.{number}") for number in range(8)]
        assert reported == [422] * 3 + [429] * 5


@pytest.mark.fault(148)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_named_proxy_is_believed_by_every_command(tmp_path: Path, command: str) -> None:
    """Client, host and scheme are those the proxy sends: its own pages may generate, and each client has its rate."""
    named = {"TRUSTED_PROXIES": "127.0.0.1", "ALLOWED_HOSTS": "draw.example", "ALLOW_ANONYMOUS": "1"}
    with serving(tmp_path, command, RATE_LIMIT="1/hour", **named) as url:
        proxy = {"x_forwarded_host": "draw.example", "x_forwarded_proto": "https"}
        own, foreign = "https://draw.example", url.replace("http", "https")
        assert asked(url, x_forwarded_for="198.51.100.7", origin=own, **proxy) == 422
        assert asked(url, x_forwarded_for="198.51.100.8", origin=foreign, **proxy) == 403
        clients = ("198.51.100.7", "198.51.100.8", "203.0.113.1, 198.51.100.8")
        assert [asked(url, x_forwarded_for=client, **proxy) for client in clients] == [429, 422, 429]


@pytest.mark.fault(148)
def test_a_client_another_process_made_of_a_header_is_not_believed() -> None:
    """Ray's proxy is a uvicorn of its own and passes on the client it parsed: no real connection has port 0."""
    rewritten = {
        "type": "http",
        "scheme": "https",
        "client": ("198.51.100.7", 0),
        "headers": [(b"x-forwarded-for", b"198.51.100.7"), (b"host", b"localhost")],
    }
    seen = TrustedProxies().seen_through(rewritten)
    assert (seen["client"][0], seen["scheme"], seen["state"]["forwarded"]) == ("127.0.0.1", "http", True)
    direct = {**rewritten, "client": ("198.51.100.7", 55_000)}
    assert TrustedProxies().seen_through(direct)["client"][0] == "198.51.100.7"
    old = {**rewritten, "client": ("127.0.0.1", 5), "headers": [], "http_version": "1.0"}
    assert TrustedProxies().seen_through(old)["state"]["forwarded"], "nginx's plain proxy_pass asks so and adds nothing"


TRUSTED = TrustedProxies((ip_network("127.0.0.1"), ip_network("172.16.0.0/12")))


def behind(peer: str, *headers: tuple[bytes, bytes], version: str = "1.1") -> tuple[str, bool]:
    """The client as seen, and whether it came through an untrusted proxy."""
    scope = {"type": "http", "scheme": "http", "client": (peer, 5), "headers": list(headers), "http_version": version}
    seen = TRUSTED.seen_through(scope)
    return seen["client"][0], seen["state"]["forwarded"]


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-real-ip", b"9.9.9.9")],
        [(b"forwarded", b"for=9.9.9.9")],
        [(b"via", b"1.1 x")],
        [(b"x-forwarded-proto", b"https")],
    ],
)
def test_a_trusted_proxy_that_does_not_tell_who_asks_opens_nothing(headers: list[tuple[bytes, bytes]]) -> None:
    """Its clients are not taken for the local operator; a proxy that sends the client address is believed."""
    assert behind("127.0.0.1", *headers) == ("127.0.0.1", True)
    assert behind("127.0.0.1", version="1.0") == ("127.0.0.1", True)
    assert behind("127.0.0.1", *headers, (b"x-forwarded-for", b"9.9.9.9")) == ("9.9.9.9", False)
    assert behind("127.0.0.1") == ("127.0.0.1", False)


@pytest.mark.parametrize("forged", [b"127.0.0.1", b"::1", b"127.0.0.2", b"localhost", b"::ffff:127.0.0.1", b"[::1]:80"])
def test_the_loopback_of_another_machine_is_not_this_one(forged: bytes) -> None:
    """All external clients arrive from Docker's gateway: a loopback address in their headers is not believed."""
    assert behind("127.0.0.1", (b"x-forwarded-for", forged + b", 172.18.0.1"))[1]
    assert behind("172.18.0.1", (b"x-forwarded-for", forged))[1]
    assert behind("127.0.0.1", (b"x-forwarded-for", b"127.0.0.1")) == ("127.0.0.1", False)


def test_a_port_behind_an_address_makes_no_other_client() -> None:
    """Azure's gateways add the port, which differs per connection: rates use the address only."""
    assert behind("127.0.0.1", (b"x-forwarded-for", b"9.9.9.9:1234"))[0] == "9.9.9.9"
    assert behind("127.0.0.1", (b"x-forwarded-for", b"[2001:db8::1]:1234"))[0] == "2001:db8::1"
    assert behind("127.0.0.1", (b"x-forwarded-for", b"2001:db8::1"))[0] == "2001:db8::1"
