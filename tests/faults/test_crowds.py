"""Hundreds of idle or slow clients: others are served as usual. Fake model."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server
from fakes import until

pytestmark = pytest.mark.slow

CREATE = "/create_and_upload_image"
ORDER = {"prompt": "a red square", "width": 64, "height": 64}
_HALF = b"POST /create_and_upload_image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def painted(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    command = (sys.executable, str(ROOT / "tests" / "painted_server.py"), "0.02")
    server = start_server(tmp_path, port, *command, PORT=str(port))
    yield server
    server.stop()


def connected(server: Server, stack: ExitStack) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=30))


def draws(server: Server, name: str) -> bool:
    """Whether an image is generated, and the server stays live, all the while."""
    asked = {**ORDER, "save_path": f"{name}.webp"}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        return client.get("/healthz").status_code == client.get(CREATE, params=asked).status_code == 200


@pytest.mark.fault(63)
def test_a_thousand_connections_that_say_nothing_cost_the_others_nothing(painted: Server) -> None:
    """The server holds them, generates an image meanwhile, and frees their descriptors when they close."""
    before = _descriptors(painted)
    with ExitStack() as stack:
        for _ in range(1000):
            connected(painted, stack)
        until(lambda: _descriptors(painted) >= before + 1000)
        assert all(draws(painted, f"beside-{n}") for n in range(5))
    until(lambda: _descriptors(painted) < before + 50)
    assert draws(painted, "afterwards")


@pytest.mark.fault(63)
def test_bodies_that_come_byte_by_byte_hold_no_place_in_the_queue(painted: Server) -> None:
    """A hundred requests that send a byte now and then: none starts, and normal requests are served."""
    with ExitStack() as stack:
        slow = [connected(painted, stack) for _ in range(100)]
        for each in slow:
            each.sendall(_HALF + b"Content-Length: 1000\r\n\r\n{")
        for n in range(5):
            for each in slow:
                each.sendall(b" ")
            assert draws(painted, f"meanwhile-{n}")
        assert "sds_queue_waiting 0.0" in httpx.get(f"{painted.url}/metrics").text
    assert draws(painted, "afterwards")


@pytest.mark.fault(63)
def test_readers_that_do_not_read_hold_up_nobody(painted: Server) -> None:
    """Two hundred request an image and do not read it; memory stays bounded by the socket buffers."""
    assert draws(painted, "popular")
    asked = b"GET /files/static/uploads/popular.webp HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(200):
            reader = connected(painted, stack)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.sendall(asked * 20)
        assert all(draws(painted, f"besides-{n}") for n in range(5))
    assert draws(painted, "afterwards")


@pytest.mark.fault(63)
def test_a_connection_that_is_kept_open_without_use_is_closed_at_last(painted: Server) -> None:
    """An idle client is disconnected after the keep-alive time, so connections are not held forever."""
    with ExitStack() as stack:
        line = connected(painted, stack)
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        began, last = time.monotonic(), b"?"
        while last and time.monotonic() - began < 30:
            last = line.recv(4096)
        assert last == b""


def _descriptors(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("process_open_fds "))
