"""The HTTP parser of `serve`: limits on chunks and on the time for a head, and no traceback for invalid HTTP."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import httpx
import pytest
import uvicorn
from fakes import until
from live_servers import LiveServer
from starlette.types import Receive, Scope, Send

from stable_diffusion_server.app.http_protocol import FREE_CHUNKS, LEAST_CHUNK_BYTES, BoundedProtocol
from stable_diffusion_server.observability.logs import LibraryLogHandler, configure_logging

pytestmark = pytest.mark.slow

SMALL = b"1\r\n \r\n"
Ask = Callable[..., socket.socket]


class Hasty(BoundedProtocol):
    """The same, with shorter timeouts."""

    head_seconds = 0.4


async def early(scope: Scope, receive: Receive, send: Send) -> None:
    """An application: `/early` responds before the body, `/half` begins to, `/` returns the body's length."""
    if scope["type"] != "http":
        return
    size, more = 0, scope["path"] not in ("/early", "/half")
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/half":
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def serving(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], int]]:
    """Start a server with this protocol and check at the end that its log has no traceback; return its port."""
    running: list[tuple[uvicorn.Server, threading.Thread, socket.socket]] = []

    def start() -> int:
        configure_logging("info", "json")
        listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(early, http=Hasty, log_config=None, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread, listening))
        until(lambda: server.started)
        return int(listening.getsockname()[1])

    yield start
    for server, thread, listening in running:
        server.should_exit = True
        thread.join(30)
        listening.close()
    logged = capfd.readouterr().err
    assert "Traceback" not in logged
    assert all(json.loads(line)["level"] == "warning" for line in logged.splitlines())


def reported(port: int, *parts: bytes, path: bytes = b"/") -> bytes:
    """The whole response to a body sent in these pieces, until the server closes or stops sending."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=2)) as client:
        client.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        heard = b""
        with suppress(OSError):
            for part in parts:
                client.sendall(part)
                time.sleep(0.05)
            client.shutdown(socket.SHUT_WR)
            while new := client.recv(65536):
                heard += new
        return heard


@pytest.mark.fault(174)
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (SMALL * FREE_CHUNKS + b"0\r\n\r\n", b"200"),
        (SMALL * (FREE_CHUNKS + 100) + b"0\r\n\r\n", b"400"),
        (SMALL * 50_000, b"400"),
        (b"10\r\n" + b" " * 16 + b"\r\n" + SMALL * 20_000, b"400"),
        ((b"%x\r\n" % LEAST_CHUNK_BYTES + b" " * LEAST_CHUNK_BYTES + b"\r\n") * 5_000 + b"0\r\n\r\n", b"200"),
        ((b"1;" + b"e" * 100 + b"\r\n \r\n") * 5_000, b"400"),
    ],
)
def test_chunks_have_a_useful_size_or_are_refused(serving: Callable[[], int], body: bytes, status: bytes) -> None:
    """A thousand chunks may be small, on both sides of that limit; the number of large ones is unlimited.

    A client that continues after a refusal may see a connection reset before it reads the response.
    """
    assert reported(serving(), body)[9:12] in (status, b"" if status == b"400" else status)


@pytest.mark.fault(174)
@pytest.mark.parametrize(
    "rubbish", [b"-1\r\n", b"zz\r\n", b"1\r\nabc", b"\xff" * 100, b"0\r\nno header\r\n\r\n", SMALL * 9_000]
)
@pytest.mark.parametrize("path", [b"/early", b"/half", b"/"])
def test_rubbish_in_a_body_is_refused_or_the_connection_closed(
    serving: Callable[[], int], rubbish: bytes, path: bytes
) -> None:
    """Before, after and during a response: at most one response, and no traceback in the log."""
    heard = reported(serving(), SMALL, rubbish, path=path)
    assert heard.count(b"HTTP/1.1") <= 1
    assert heard.startswith(b"HTTP/1.1 400" if path == b"/" else b"HTTP/1.1 200") or not heard


@pytest.mark.fault(174)
@pytest.mark.parametrize("head", [b"", b"G", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nX: " + b"a" * 9_000])
@pytest.mark.parametrize("second", [False, True])
def test_a_head_that_does_not_come_closes_the_connection(serving: Callable[[], int], head: bytes, second: bool) -> None:
    """No byte, one letter, half, a long one; as the first request, and after an answered one."""
    with closing(socket.create_connection(("127.0.0.1", serving()), timeout=20)) as client:
        if second:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            while not client.recv(65536).endswith(b"0\r\n\r\n"):
                pass
        client.sendall(head)
        heard = b"x"
        while heard and (head or not second):  # a connection that waits for a further request may wait
            heard = client.recv(65536)


@pytest.mark.fault(174)
def test_a_body_that_takes_its_time_is_not_taken_for_a_head(serving: Callable[[], int]) -> None:
    """The body takes longer than the limit for a head; then a second request on the same connection."""
    with closing(socket.create_connection(("127.0.0.1", serving()), timeout=20)) as client:
        for _ in range(2):
            client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")
            for _ in range(3):
                time.sleep(2 * Hasty.head_seconds / 3)
                client.sendall(b"a")
            heard = b""
            while not heard.endswith(b"0\r\n\r\n"):
                heard += client.recv(65536)
            assert b"\r\n3\r\n" in heard


@pytest.mark.fault(174)
def test_a_server_answers_others_under_a_flood_of_small_chunks(live_of: Callable[..., LiveServer]) -> None:
    """An anonymous client is refused, and the rest of its body closes the connection at once."""
    live = live_of(api_keys="ann:secret-of-ann")
    port = int(live.url.rsplit(":", 1)[1])
    for path in (b"/create_and_upload_image", b"/ui/key", b"/healthz", b"/style_transfer_and_upload_image"):
        assert reported(port, SMALL * 400, *[SMALL * 1000] * 30, path=path).count(b"HTTP/1.1") <= 1
    assert httpx.get(f"{live.url}/healthz").status_code == 200


@pytest.mark.fault(174)
def test_what_libraries_log_is_a_line_of_json(capfd: pytest.CaptureFixture[str]) -> None:
    """uvicorn, asyncio and others: a warning, an error with its traceback, a message with wrong arguments."""
    configure_logging("info", "json")
    configure_logging("info", "json")  # twice in a process: each message stays one line
    logging.getLogger("uvicorn.error").warning("Invalid %s", "request")
    try:
        int("a\nb")
    except ValueError:
        logging.getLogger("asyncio").exception("Task failed")
    LibraryLogHandler().handle(
        logging.makeLogRecord({"name": "other", "levelno": logging.ERROR, "msg": "%d", "args": ("x",)})
    )
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["logger"], line["level"]) for line in lines] == [
        ("Invalid request", "uvicorn.error", "warning"),
        ("Task failed", "asyncio", "error"),
        ("%d", "other", "error"),
    ]
    assert "ValueError" in lines[1]["exception"]


@pytest.mark.fault(174)
@pytest.mark.parametrize(
    ("head", "status", "kind"),
    [
        (b"GET /" + b"a" * 100_000, 431, "headers-too-large"),
        (b"GET /?prompt=" + b"a" * 3_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "headers-too-large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 3_000_000 + b"\r\n\r\n", 431, "headers-too-large"),
        (b"no HTTP at all\r\n\r\n" + b"a" * 3_000_000, 400, "malformed"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nno header\r\n\r\n", 400, "malformed"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400, "malformed"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "malformed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 300, 400, "malformed"),
    ],
)
def test_a_request_that_is_no_http_gets_a_problem_document(
    serving: Callable[[], int], head: bytes, status: int, kind: str
) -> None:
    """The client can read it, also when it still sends: the connection is closed, not reset."""
    with closing(socket.create_connection(("127.0.0.1", serving()), timeout=20)) as client:
        client.sendall(head)
        heard = b""
        while new := client.recv(65536):
            heard += new
    start, _, body = heard.partition(b"\r\n\r\n")
    first, *lines = start.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert first.startswith(f"HTTP/1.1 {status}")
    problem = json.loads(body)
    assert (problem["status"], problem["type"].rpartition(":")[2]) == (status, kind), problem
    assert problem["request_id"] == headers["x-request-id"]
    assert headers["content-type"] == "application/problem+json"
    assert (headers["x-content-type-options"], headers["connection"]) == ("nosniff", "close")


@pytest.mark.fault(174)
def test_a_client_that_sends_on_after_a_refusal_is_disconnected(serving: Callable[[], int]) -> None:
    """After some megabytes; without this bound it would keep the connection busy."""
    with closing(socket.create_connection(("127.0.0.1", serving()), timeout=20)) as client:
        sent = 0
        with suppress(OSError):
            while sent < 2**30:
                client.sendall(b"a" * 2**20)
                sent += 2**20
        assert sent < 2**30
