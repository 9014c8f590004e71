"""Stalled and slow request bodies: every route refuses them in time, and no caller can fill the memory with them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from fakes import until
from live_servers import LiveServer

pytestmark = pytest.mark.slow

MULTIPART = "multipart/form-data; boundary=x"
ROUTES = [
    ("/create_and_upload_image", "application/json", b'{"prompt": "a'),
    ("/create_and_upload_image", "application/x-www-form-urlencoded", b"prompt=a"),
    (
        "/style_transfer_bytes_and_upload_image",
        MULTIPART,
        b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\na",
    ),
    ("/edit_and_upload_image", "application/json", b'{"image_url": ["'),
    ("/v1/images/generations", "application/json", b"{"),
    ("/v1/images/edits", MULTIPART, b"--x\r\n"),
    ("/sdapi/v1/txt2img", "application/json", b"{"),
    ("/sdapi/v1/img2img", "application/json", b'{"init_images": ["'),
    ("/v1/replay", MULTIPART, b""),
    ("/v1/verify", MULTIPART, b""),
]
KEYS = {"api_keys": "a:secret-of-a-1234567,b:secret-of-b-1234567"}


def opened(
    live: LiveServer, stack: ExitStack, path: str, media_type: str, length: int | None, key: str = ""
) -> socket.socket:
    """A connection on which the request head was sent; without a length the body is chunked."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    line = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {media_type}\r\n{size}\r\n"
    line.sendall(f"{head}{f'X-API-Key: {key}' if key else 'X-Nothing: 1'}\r\n\r\n".encode())
    return line


def answered(line: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the response, read to the end of the connection."""
    data = b""
    while part := line.recv(65_536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.fault(114)
@pytest.mark.parametrize(
    ("path", "media_type", "begun"), ROUTES, ids=[f"{path} {kind[:19]}" for path, kind, _ in ROUTES]
)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_stands_still_is_refused_at_every_route(
    live_of: Callable[..., LiveServer],
    path: str,
    media_type: str,
    begun: bytes,
    chunked: bool,
) -> None:
    """408 in the dialect's error format, and the server closes the connection."""
    live = live_of(body_timeout=0.5)
    with ExitStack() as stack:
        line = opened(live, stack, path, media_type, None if chunked else 100_000)
        if begun:
            line.sendall(b"%x\r\n%b\r\n" % (len(begun), begun) if chunked else begun)
        status, reported = answered(line)
        assert status == 408
        assert "0.5 seconds" in json.dumps(reported)


@pytest.mark.fault(114)
def test_the_studios_own_routes_have_the_same_bound(live_of: Callable[..., LiveServer]) -> None:
    """Includes the login page, which accepts a key before the caller is authenticated."""
    live = live_of(body_timeout=0.5, ui=True, **KEYS)
    with ExitStack() as stack:
        line = opened(live, stack, "/ui/key", "application/x-www-form-urlencoded", 1000)
        line.sendall(b"key=")
        assert answered(line)[0] == 408


@pytest.mark.fault(114)
def test_a_body_that_drips_is_refused_and_one_that_comes_slowly_enough_is_not(
    live_of: Callable[..., LiveServer],
) -> None:
    """Occasional bytes do not keep a connection open; BODY_MIN_RATE does, for longer than BODY_TIMEOUT."""
    live = live_of(body_timeout=1.0, body_min_rate=2000.0)
    body = json.dumps({"prompt": "a red square", "width": 64, "height": 64}).encode()
    with ExitStack() as stack:
        dripping = opened(live, stack, "/create_and_upload_image", "application/json", len(body) + 20_000)
        slow = opened(live, stack, "/create_and_upload_image", "application/json", len(body) + 20_000)
        slow.sendall(body)
        dripping.sendall(body)
        for _ in range(20):
            slow.sendall(b" " * 1000)
            dripping.settimeout(0.2)
            try:
                dripping.sendall(b" ")
                if dripping.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("a dripping body was never refused")
        rest = len(body) + 20_000
        slow.sendall(b" " * rest)  # more than the server reads: it discards the excess
        slow.settimeout(30)
        assert slow.recv(12).endswith(b"200")


@pytest.mark.fault(114)
def test_unfinished_bodies_of_one_caller_are_bounded_and_leave_memory_for_others(
    live_of: Callable[..., LiveServer],
) -> None:
    """The server reads only half a budget of one key's 24 large bodies; it reads another key's at once."""
    size, budget = 12_000_000, 48_000_000
    live = live_of(body_timeout=20.0, bodies_bytes=budget, max_upload_bytes=size, **KEYS)
    sent = 0
    with ExitStack() as stack:
        for _ in range(24):
            line = opened(live, stack, "/sdapi/v1/img2img", "application/json", size, "secret-of-a-1234567")
            line.setblocking(False)
            stalled_at = time.monotonic() + 0.3
            left = size - 1
            while left and time.monotonic() < stalled_at:
                try:
                    left -= line.send(b" " * min(left, 65_536))
                    stalled_at = time.monotonic() + 0.3
                except BlockingIOError:
                    time.sleep(0.01)
            sent += left == 0
        assert sent <= 2, "a body beyond the caller's part was read to its end"
        asked = {"prompt": "a red square", "width": 64, "height": 64, "steps": 2}
        answer = httpx.post(
            f"{live.url}/sdapi/v1/txt2img", json=asked, headers={"X-API-Key": "secret-of-b-1234567"}, timeout=15
        )
        assert answer.status_code == 200
    until(lambda: httpx.get(f"{live.url}/healthz").status_code == 200)
    answer = httpx.post(
        f"{live.url}/sdapi/v1/txt2img", json=asked, headers={"X-API-Key": "secret-of-a-1234567"}, timeout=15
    )
    assert answer.status_code == 200, "the memory of those who left is free again"


@pytest.mark.fault(114)
def test_a_body_that_finds_no_memory_gets_429_and_retry_after(live_of: Callable[..., LiveServer]) -> None:
    """Of two arriving bodies with memory for one, one gets 429 after BODY_TIMEOUT."""
    size = 1_900_000
    live = live_of(body_timeout=3.0, body_min_rate=0.0, bodies_bytes=2_000_000, max_upload_bytes=size)
    with ExitStack() as stack:
        lines = [opened(live, stack, "/sdapi/v1/img2img", "application/json", size) for _ in range(2)]
        left = [size - 1, size - 1]
        refused: list[bytes] = []
        until_when = time.monotonic() + 30
        while not refused and time.monotonic() < until_when:
            for number, line in enumerate(lines):
                line.settimeout(0.1)
                with suppress(TimeoutError, ConnectionError):  # the server does not read a body that gets no memory
                    left[number] -= line.send(b" " * min(left[number], 65_536))
                line.settimeout(0.05)
                with suppress(TimeoutError):
                    refused.append(line.recv(4096))
        assert refused[0].startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in refused[0].lower()


def opened_from(live: LiveServer, stack: ExitStack, address: str, length: int | None, key: str = "") -> socket.socket:
    """A connection from another local address, with the head of a large body sent."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    line = stack.enter_context(socket.create_connection((host, int(port)), 30, (address, 0)))
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    head = f"POST /sdapi/v1/img2img HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{size}\r\n"
    line.sendall(f"{head}{f'X-API-Key: {key}' if key else 'X-Nothing: 1'}\r\n\r\n".encode())
    return line


def drawn_with(live: LiveServer, padding: int, **headers: str) -> tuple[int, float]:
    """Status of a request padded with so many bytes of blanks, and its duration in seconds."""
    asked = json.dumps({"prompt": "a red square", "width": 64, "height": 64, "steps": 2}).encode() + b" " * padding
    began = time.monotonic()
    kind = {"Content-Type": "application/json", **headers}
    answer = httpx.post(f"{live.url}/sdapi/v1/txt2img", content=asked, headers=kind, timeout=30)
    return answer.status_code, time.monotonic() - began


@pytest.mark.fault(190)
@pytest.mark.parametrize("begun", [0, 1, 1000, 65_537], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_bodies_that_bring_nothing_keep_no_memory_from_others(
    live_of: Callable[..., LiveServer], begun: int, chunked: bool
) -> None:
    """Eight addresses announce 32 MB each and stall at once or later: another caller's body is read at once."""
    size = 33_554_432
    live = live_of(body_timeout=20.0, allow_anonymous=True)
    with ExitStack() as stack:
        for number in range(16):
            line = opened_from(live, stack, f"127.0.0.{number % 8 + 2}", None if chunked else size)
            line.sendall(b"%x\r\n%b\r\n" % (begun, b" " * begun) if chunked and begun else b" " * begun)
        status, seconds = drawn_with(live, 600_000)
        assert status == 200
        assert seconds < 10, "it waited for bodies that stand still"


@pytest.mark.fault(190)
def test_anonymous_bodies_that_do_arrive_leave_half_the_memory_to_keys(live_of: Callable[..., LiveServer]) -> None:
    """Twelve anonymous addresses send all but the last byte of the memory budget: a key's body is read at once."""
    size = 2_000_000
    live = live_of(body_timeout=20.0, allow_anonymous=True, bodies_bytes=8_000_000, max_upload_bytes=size, **KEYS)
    with ExitStack() as stack:
        for number in range(12):
            line = opened_from(live, stack, f"127.0.0.{number + 2}", size)
            line.settimeout(0.3)
            with suppress(TimeoutError):
                line.sendall(b" " * (size - 1))
        status, seconds = drawn_with(live, 900_000, **{"X-API-Key": "secret-of-a-1234567"})
        assert status == 200
        assert seconds < 10, "it waited for strangers"


@pytest.mark.fault(114)
@pytest.mark.parametrize("path", ["/ui/key", "/ui/gradio_api/queue/join", "/ui/nothing"])
def test_strangers_at_the_studio_hold_no_more_memory_than_its_routes_read(
    live_of: Callable[..., LiveServer], path: str
) -> None:
    """Whatever length and type they claim; otherwise a few addresses could hold the memory of callers with keys."""
    budget = 4_000_000
    live = live_of(body_timeout=5.0, bodies_bytes=budget, max_upload_bytes=budget, ui=True, **KEYS)
    with ExitStack() as stack:
        line = opened(live, stack, path, MULTIPART, budget)
        line.settimeout(5)
        assert line.recv(12).endswith((b"413", b"401"))
        for _ in range(4):
            opened(live, stack, path, MULTIPART, None)
        asked = {"prompt": "a red square", "width": 64, "height": 64, "steps": 2, "styles": ["x" * 4000] * 500}
        began = time.monotonic()
        answer = httpx.post(
            f"{live.url}/sdapi/v1/txt2img", json=asked, headers={"X-API-Key": "secret-of-b-1234567"}, timeout=15
        )
        assert time.monotonic() - began < 4, answer.status_code
