"""Storage on loopback for tests: an S3 server, a GCS emulator, and a proxy that misbehaves on request."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pydantic import SecretStr

from stable_diffusion_server.settings import Settings
from stable_diffusion_server.storage.base import Bucket
from stable_diffusion_server.storage.factory import StorageOptions, open_bucket

HERE = Path(__file__).resolve().parent
SECRET = "sesame-open-0123456789"  # noqa: S105  # dummy key of the loopback S3 server
KEYS = {"aws_access_key_id": SecretStr("AKIAEXAMPLE"), "aws_secret_access_key": SecretStr(SECRET)}


@dataclass
class StorageServer:
    """A storage server process."""

    process: subprocess.Popen[bytes]
    url: str
    port: int
    wire: Path

    def stop(self) -> None:
        """End the process, like an outage."""
        self.process.kill()
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: list[str], port: int, folder: Path, **environment: str) -> StorageServer:
    """Start a storage server and wait until it listens."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with (folder / f"server-{port}.log").open("ab") as out:
        process = subprocess.Popen(  # noqa: S603  # our own command, made here
            command, cwd=folder, env={**kept, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return StorageServer(process, f"http://127.0.0.1:{port}", port, folder / "wire.log")
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError((folder / f"server-{port}.log").read_text())


def start_s3(folder: Path, port: int = 0, **environment: str) -> StorageServer:
    """Start moto's S3 server: objects in memory, no signature check by default."""
    port = port or free_port()
    command = [sys.executable, str(HERE / "s3_server.py"), "-H", "127.0.0.1", "-p", str(port)]
    return start(command, port, folder, **environment)


def start_gcs(folder: Path, port: int = 0) -> StorageServer:
    """The GCS emulator, with conditional uploads."""
    port = port or free_port()
    return start([sys.executable, str(HERE / "gcs_emulator.py"), str(port), str(folder / "wire.log")], port, folder)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    """An S3 server for the whole test run."""
    running = start_s3(tmp_path_factory.mktemp("s3"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageServer]:
    """A GCS emulator for the whole test run."""
    running = start_gcs(tmp_path_factory.mktemp("gcs"))
    yield running
    running.stop()


@cache
def s3_client(url: str, key: str = "AKIAEXAMPLE", secret: str = SECRET, service: str = "s3") -> Any:
    """A separate client, to look at the store from outside."""
    import boto3

    return boto3.client(
        service, endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
    )


def make_s3_bucket(server: StorageServer, name: str = "") -> str:
    """Create a publicly readable bucket; return its name."""
    name = name or f"pictures-{uuid4().hex[:12]}"
    s3_client(server.url).create_bucket(Bucket=name)
    anyone = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{name}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [anyone]})
    s3_client(server.url).put_bucket_policy(Bucket=name, Policy=policy)
    return name


def make_gcs_bucket(server: StorageServer) -> str:
    """Create a bucket; return its name."""
    name = f"pictures-{uuid4().hex[:12]}"
    httpx.post(f"{server.url}/storage/v1/b", json={"name": name}).raise_for_status()
    return name


def storage_options(**values: Any) -> StorageOptions:
    """The default settings, independent of this process's environment; keys have no prefix."""
    return Settings.model_construct(**{"bucket_path": "", **values})


def changed(options: StorageOptions, **changes: Any) -> StorageOptions:
    """A copy of the settings with other values."""
    assert isinstance(options, Settings)
    return options.model_copy(update=changes)


def r2_options(url: str, name: str, **changes: Any) -> StorageOptions:
    """Options for an S3 server on loopback, addressed like R2: by endpoint, region auto."""
    values = {"storage_provider": "r2", "r2_endpoint_url": url, "bucket_name": name, "storage_timeout": 20.0, **KEYS}
    return storage_options(**{**values, **changes})


def gcs_options(name: str, **changes: Any) -> StorageOptions:
    """Options for the emulator, whose address is in STORAGE_EMULATOR_HOST."""
    values = {"storage_provider": "gcs", "bucket_name": name, "storage_timeout": 20.0}
    return storage_options(**{**values, **changes})


def opened(options: StorageOptions) -> Bucket:
    """A bucket made from the options and opened."""
    bucket = open_bucket(options)
    bucket.open()
    return bucket


# S3's responses under our names: status and code.
S3_REFUSALS = {
    "slow-down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "expired": (400, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "broken": (500, "InternalError"),
}


class _Quiet(ThreadingHTTPServer):
    """A server that does not report connections closed by clients."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


@dataclass
class Said:
    """The proxy's own response.

    `after` means that the server first processed the request, and is the server's status.
    """

    status: int
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False


def refused(code: str, status: int) -> Said:
    """S3's error response to one request."""
    content = f"<Error><Code>{code}</Code><Message>As the test asked.</Message></Error>".encode()
    return Said(status, content, {"Content-Type": "application/xml"})


class MisbehavingStore:
    """A proxy in front of a storage server that misbehaves, one request at a time, as `mischief` says.

    A word of `S3_REFUSALS` answers with that error; `reset` breaks the connection in the middle of the response;
    `lose-answer` lets the server process the request, and then breaks the connection; `slow` waits until `release`
    is set; any other word has no effect. The first request takes the first word, with any method or with those of
    `only`; without words everything passes, except the headers named in `drops`.

    Before that, `rule` is called with method, path and headers of each request: it returns a word, including
    `close` (no response) and `noise` (not HTTP), or a response to send in the server's place.
    """

    def __init__(self, port: int) -> None:
        self.mischief: deque[str] = deque()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.drops: set[str] = set()
        self.only: set[str] = set()
        self.rule: Callable[[str, str, Mapping[str, str]], str | Said] = lambda method, path, headers: ""
        self.body_rule: Callable[[str, bytes], str | Said] = lambda method, body: ""
        self.release = Event()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self, port))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Release waiting requests, and stop listening."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(rascal: MisbehavingStore, port: int) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if self.raw_requestline and self.parse_request():
                self.close_connection = True
                self._pass_on()

        def _pass_on(self) -> None:
            if self.headers.get("Expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            rascal.requests.append((self.command, self.path, dict(self.headers)))
            meant = not rascal.only or self.command in rascal.only
            word = rascal.rule(self.command, self.path, dict(self.headers)) or rascal.body_rule(self.command, body)
            said, word = (word, "") if isinstance(word, Said) else (None, word)
            if said is not None and not said.after:
                self._answer(said.status, said.headers, said.content)
                return
            if word in ("close", "noise"):
                self.wfile.write(b"\0\1 what you ask is none of my business\r\n" if word == "noise" else b"")
                self._reset()
                return
            if not word and said is None:
                word = rascal.mischief.popleft() if rascal.mischief and meant else ""
            if word in S3_REFUSALS:
                status, code = S3_REFUSALS[word]
                content = f"<Error><Code>{code}</Code><Message>As the test asked.</Message></Error>".encode()
                self._answer(status, {"Content-Type": "application/xml"}, content)
                return
            if word == "slow":
                rascal.release.wait(60)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            dropped = {name.lower() for name in ("Expect", *rascal.drops)}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            if said is not None:
                kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("etag",)}
                self._answer(answer.status, {**kept, **said.headers}, said.content or content)
            elif word == "lose-answer":
                self._reset()
            elif word == "reset":
                self._answer(answer.status, dict(answer.getheaders()), content[: len(content) // 2], len(content) or 10)
                self._reset()
            else:
                self._answer(answer.status, dict(answer.getheaders()), content)

        def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
            dropped = ("Transfer-Encoding", "Connection", "Content-Length")
            kept = {name: value for name, value in headers.items() if name.title() not in dropped}
            reported = headers.get("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_response_only(status)
            for name, value in {**kept, "Content-Length": str(length) if length else reported or "0"}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            self.wfile.flush()

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def finish(self) -> None:
            with suppress(OSError, ValueError):  # the connection may have been broken on purpose
                super().finish()

    return Handler


@pytest.fixture
def rascal_before() -> Iterator[Callable[[StorageServer], MisbehavingStore]]:
    """Put a proxy in front of a storage server."""
    made: list[MisbehavingStore] = []

    def put(server: StorageServer) -> MisbehavingStore:
        made.append(MisbehavingStore(server.port))
        return made[-1]

    yield put
    for rascal in made:
        rascal.close()


def conditions_on_the_wire(server: StorageServer, name: str) -> list[str | None]:
    """The conditions of this name's uploads, as received by the GCS emulator."""
    lines = [json.loads(line) for line in server.wire.read_text().splitlines()]
    return [line["ifGenerationMatch"] for line in lines if line["name"] == name]
