"""A web server that misbehaves as the path says, and a fake DNS resolver over a table."""

from __future__ import annotations

import asyncio
import gzip
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from fakes import disc, file_of

PICTURE = file_of(disc())
GZIP_BOMB = gzip.compress(PICTURE + bytes(50_000_000))
Writer = asyncio.StreamWriter


class MisbehavingServer:
    """A web server with one kind of bad response per path; records the head of every request."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.open = 0
        self.port = 0

    async def start(self, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self.open += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                await self._answer(head.split()[1], reader, writer)
                await writer.drain()
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, path: str, reader: asyncio.StreamReader, writer: Writer) -> None:
        name, _, rest = path.strip("/").partition("/")
        match name:
            case "picture":
                writer.write(answer(PICTURE))
            case "html":
                writer.write(answer(b"<html>" + b" " * 100, "Content-Type: image/png"))
            case "status":
                writer.write(answer(PICTURE, status=int(rest)))
            case "to":
                writer.write(answer(b"", f"Location: {rest}", status=302))
            case "to-long":
                writer.write(answer(b"", "Location: http://" + "a" * 3000, status=302))
            case "nowhere":
                writer.write(answer(b"", status=302))
            case "hops":
                writer.write(
                    answer(b"", f"Location: /hops/{int(rest) - 1}", status=307) if int(rest) else answer(PICTURE)
                )
            case "gzip":
                writer.write(answer(PICTURE, "Content-Encoding: gzip"))
            case "gzip-bomb":
                writer.write(answer(GZIP_BOMB, "Content-Encoding: gzip"))
            case "gzip-transfer":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
            case "length":
                writer.write(b"HTTP/1.1 200 OK\r\n")
                writer.write(
                    b"".join(
                        b"Content-Length: %b\r\n" % value.replace("huge", "9" * 5000).encode()
                        for value in rest.split(",")
                    )
                )
                writer.write(b"\r\n" + PICTURE)
            case "circle":
                writer.write(answer(b"", "Location: /circle", status=308))
            case "headers" | "interim":
                writer.write(b"HTTP/1.1 200 OK\r\n" if name == "headers" else b"")
                while not writer.is_closing():
                    writer.write(b"X-A: b\r\n" * 100 if name == "headers" else b"HTTP/1.1 103 Early\r\nA: b\r\n\r\n")
                    await writer.drain()
                    await asyncio.sleep(0)
            case "size":
                writer.write(answer(PICTURE.ljust(int(rest), b"\0")))
            case "chunked":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(PICTURE), PICTURE))
            case "until-close":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE)
            case "short":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + PICTURE)
            case "garbage":
                writer.write(b"\0" * 200)
            case "silent":
                await reader.read()
            case "endless" | "drip":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE[:16])
                while not writer.is_closing():
                    writer.write(b"\0" * (65536 if name == "endless" else 1))
                    await writer.drain()
                    await asyncio.sleep(0 if name == "endless" else 0.02)


def answer(body: bytes, *headers: str, status: int = 200) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Set-Cookie: a=b", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class FakeResolver:
    """A resolver over a table; records its queries."""

    def __init__(self, **table: Sequence[str]) -> None:
        self.table = {name.replace("_", "."): list(answers) for name, answers in table.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.table:
            raise OSError("no such name")
        return self.table[host]


@contextmanager
def serve_in_thread(site: MisbehavingServer, tls: ssl.SSLContext | None = None) -> Iterator[MisbehavingServer]:
    """The server on its own thread and event loop, for synchronous tests."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(site.start(tls), loop).result()
    yield site

    async def end() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
