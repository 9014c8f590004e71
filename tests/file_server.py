"""An HTTP server on 127.0.0.1 for downloads: ranges, validators, redirects, and what hostile or broken servers send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest


@dataclass
class ServedFile:
    """What is answered at one path.

    Attributes:
        ranges: Whether `Range` is obeyed; `If-Range` too, unless `careless`.
        size: Declared length, if not the true one; 0 for none, with chunks.
        cuts: After how many bytes of a body each of the next answers ends.
    """

    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    ranges: bool = True
    careless: bool = False
    size: int | None = None
    cuts: list[int] = field(default_factory=list)


@dataclass
class FileServer:
    """Paths and what is answered there; the requests that came, and bytes of bodies by path."""

    url: str = ""
    files: dict[str, ServedFile] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: FileServer

    def log_message(self, *arguments: object) -> None:
        """Keep the console clean."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.served.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        file = self.served.files.get(path, ServedFile(status=404))
        status, body, headers = file.status, file.data, dict(file.headers)
        wanted = self.headers.get("Range", "") if file.ranges and status == 200 else ""
        validator = self.headers.get("If-Range")
        if wanted and (validator in (None, headers.get("ETag"), headers.get("Last-Modified")) or file.careless):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            if int(start) >= len(body):
                status, body = 416, b""
            else:
                last = min(int(end or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {start}-{last}/{len(body)}"
                status, body = 206, body[int(start) : last + 1]
        if file.size == 0:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers.setdefault("Content-Length", str(len(body) if file.size is None else file.size))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if file.cuts and len(body) > 1:
            body = body[: file.cuts.pop(0)]
            self.close_connection = True
        if file.size is not None and file.size != len(body):
            self.close_connection = True
        with suppress(ConnectionError):
            if file.size == 0:
                self.wfile.write(b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
            else:
                self.wfile.write(body)
        self.served.sent[path] = self.served.sent.get(path, 0) + len(body)


@contextmanager
def serve_files(host: str = "127.0.0.1") -> Iterator[FileServer]:
    """Listen on a free port until the block ends."""
    served = FileServer()
    handler = type("Handler", (_Handler,), {"served": served})
    with ThreadingHTTPServer((host, 0), handler) as server:
        server.daemon_threads = True
        served.url = f"http://{host}:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


@pytest.fixture
def file_server() -> Iterator[FileServer]:
    """A server without files."""
    with serve_files() as served:
        yield served
