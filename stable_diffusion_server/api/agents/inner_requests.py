"""Requests that a tool makes to this server's own routes, inside the process and with the rights of its caller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from stable_diffusion_server.errors import TooLarge
from stable_diffusion_server.parsing import dumps

# Headers of the outer request that say who asks, and none of what it asks.
_KEPT = frozenset((b"host", b"authorization", b"x-api-key", b"api-key", b"user-agent", b"origin", b"referer"))
_PREFIXES = (b"sec-fetch-",)


@dataclass(frozen=True, slots=True)
class InnerAnswer:
    """An answer of a route: its status, its media type and its body."""

    status: int
    media_type: str
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body, which is a JSON object; empty for another one."""
        try:
            parsed = json.loads(self.body)
        except ValueError:
            return {}
        return parsed if isinstance(parsed, dict) else {}


@dataclass(frozen=True, slots=True)
class InnerClient:
    """Calls the routes of the app that serves a request, through all of its middleware, as the same caller.

    So a tool has the parameters, limits, rates and errors of the route that it calls.
    """

    request: Request

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: bytes = b"",
        json_body: Mapping[str, Any] | None = None,
        headers: Mapping[bytes, bytes] | None = None,
        max_bytes: int | None = None,
    ) -> InnerAnswer:
        """Return the answer of a route. Raises `TooLarge` for a body of more than `max_bytes`."""
        body = b"" if json_body is None else (await run_in_threadpool(dumps, json_body)).encode()
        sent, status, media_type, parts = False, 500, "", bytearray()

        async def receive() -> Message:
            nonlocal sent
            if sent:  # the outer request is watched by its own transport
                return await self.request.receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, media_type
            if message["type"] == "http.response.start":
                status = message["status"]
                named = dict(message["headers"])
                media_type = named.get(b"content-type", b"").decode("latin-1").partition(";")[0]
            elif message["type"] == "http.response.body":
                parts.extend(message.get("body", b""))
                if max_bytes is not None and len(parts) > max_bytes:
                    raise TooLarge(f"A file may have {max_bytes} bytes.")

        await self.request.scope["app"](self._scope(method, path, query, body, headers or {}), receive, send)
        return InnerAnswer(status, media_type, bytes(parts))

    def _scope(
        self, method: str, path: str, query: bytes, body: bytes, headers: Mapping[bytes, bytes]
    ) -> dict[str, Any]:
        outer = self.request.scope
        kept = [pair for pair in outer["headers"] if pair[0] in _KEPT or pair[0].startswith(_PREFIXES)]
        sent = {b"content-type": b"application/json", b"content-length": str(len(body)).encode(), **headers}
        state = {name: value for name, value in outer.get("state", {}).items() if name == "forwarded"}
        plain = {name: outer[name] for name in ("type", "asgi", "http_version", "scheme", "client", "server")}
        return {
            **plain,
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query,
            "headers": [*kept, *sent.items()],
            "state": state,
        }
