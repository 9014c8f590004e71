"""A minimal HTTP client, for measurements in which a full client would take most of the time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any


class Connection:
    """A keep-alive connection on loopback; one request at a time."""

    def __init__(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._port, self._reader, self._writer = port, reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect."""
        return cls(port, *await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, target: str, body: Any = None) -> bytes:
        """Response body of a GET, or of a POST of `body` as JSON. Exits if the status is not 200."""
        lines = [f"{'GET' if body is None else 'POST'} {target} HTTP/1.1", f"Host: 127.0.0.1:{self._port}"]
        sent = b"" if body is None else json.dumps(body).encode()
        if sent:
            lines += ["Content-Type: application/json", f"Content-Length: {len(sent)}"]
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + sent)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise SystemExit(f"not an answer: {head!r}")
        _, _, length = head.partition(b"content-length: ")
        if length:
            return await self._reader.readexactly(int(length.split(b"\r\n")[0]))
        return b"".join([part async for part in self._chunks()])

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Parts of a chunked response body (RFC 9112, 7.1)."""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()
