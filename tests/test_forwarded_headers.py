"""Forwarded headers count from TRUSTED_PROXIES alone, whichever command serves: real processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Server, free_port, start_server

from stable_diffusion_server.api.security.proxies import Proxies

ORDER = {"prompt": "a red circle", "width": "64", "height": "64"}
COMMANDS = {
    "uvicorn": ("-m", "uvicorn", "main:app", "--port"),
    "uvicorn that believes all": ("-m", "uvicorn", "main:app", "--forwarded-allow-ips", "*", "--port"),
    "serve": ("-m", "stable_diffusion_server", "serve"),
}


def started(folder: Path, command: str, **settings: str) -> Server:
    port = free_port()
    words = (*COMMANDS[command], *([str(port)] if "uvicorn" in command else []))
    return start_server(folder, port, sys.executable, *words, PORT=str(port), UI="0", **settings)


@pytest.fixture(scope="module", params=COMMANDS)
def unnamed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that names no proxy, by each command."""
    running = started(tmp_path_factory.mktemp("unnamed"), request.param, RATE_LIMIT="3/minute", ALLOW_ANONYMOUS="1")
    yield running
    running.stop()


def test_no_header_makes_another_client_where_no_proxy_is_named(unnamed: Server) -> None:
    """Eight forged addresses are one client: the rate is used up by the third request, whatever they say."""
    told = [
        httpx.post(f"{unnamed.url}/make_image", json={}, headers={"x-forwarded-for": f"198.51.100.{number}"})
        for number in range(8)
    ]
    assert [answer.status_code for answer in told] == [422] * 3 + [429] * 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_named_proxy_is_believed_by_every_command(tmp_path: Path, command: str) -> None:
    """The client, the host and the scheme are those it tells; links and the check of origins go by them."""
    server = started(tmp_path, command, TRUSTED_PROXIES="127.0.0.1", ALLOWED_HOSTS="draw.example", API_KEYS="k")
    try:
        headers = {
            "x-forwarded-for": "198.51.100.7",
            "x-forwarded-host": "draw.example",
            "x-forwarded-proto": "https",
            "origin": "https://draw.example",
            "x-api-key": "k",
        }
        answer = httpx.post(f"{server.url}/create_and_upload_image", data=ORDER, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["path"].startswith("https://draw.example/files/")
        foreign = {**headers, "origin": "https://127.0.0.1"}
        assert httpx.post(f"{server.url}/make_image", json={}, headers=foreign).status_code == 403
    finally:
        server.stop()


def test_a_client_another_process_made_of_a_header_is_not_believed() -> None:
    """Ray's proxy is a uvicorn of its own and passes on what that believed: no connection has port 0."""
    rewritten = {
        "type": "http",
        "scheme": "https",
        "client": ("198.51.100.7", 0),
        "headers": [(b"x-forwarded-for", b"198.51.100.7"), (b"host", b"localhost")],
    }
    seen = Proxies().seen_through(rewritten)
    assert (seen["client"][0], seen["scheme"], seen["state"]["forwarded"]) == ("127.0.0.1", "http", True)
    direct = {**rewritten, "client": ("198.51.100.7", 55_000)}
    assert Proxies().seen_through(direct)["client"][0] == "198.51.100.7"
    old = {**rewritten, "client": ("127.0.0.1", 5), "headers": [], "http_version": "1.0"}
    assert Proxies().seen_through(old)["state"]["forwarded"], "nginx's plain proxy_pass asks so and adds nothing"
