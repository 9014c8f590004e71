"""The JSON answers of every route: whatever is in them, they can be sent, and every reader takes them."""

from __future__ import annotations

from typing import Any

from starlette import responses

from stable_diffusion_server.parsing import dumps


class JSONResponse(responses.JSONResponse):
    """JSON without lone surrogates and numbers that are not finite, which others' records may hold."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content).encode()
