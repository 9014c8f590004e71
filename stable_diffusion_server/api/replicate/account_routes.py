"""Routes of a Replicate account that clients ask: the store of uploads, which is refused, and the webhooks' secret."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from stable_diffusion_server.api.dependencies import caller_of, check_operator
from stable_diffusion_server.api.http_responses import JSONResponse
from stable_diffusion_server.errors import NotFound

_NO_STORE = {"Cache-Control": "no-store"}
_NO_FILES = 'Files go into input as data URLs: in Python file_encoding_strategy="base64" makes them.'
_STANDARD = "whsec_"


def add_account_routes(routes: APIRouter, webhook_secret: str) -> None:
    """Add the routes; `webhook_secret` is shown to callers with full access only."""

    @routes.post(
        "/files",
        summary="Replicate: refused; this server has no store for uploads",
        operation_id="create_replicate_file",
        response_model=None,
        responses={200: {"content": {"application/json": {}}}},
    )
    async def create_file(request: Request) -> Response:
        """Refused with 501, on which Replicate's Node client sends files as data URLs."""
        raise HTTPException(501, _NO_FILES)

    @routes.get(
        "/webhooks/default/secret",
        summary="Replicate: the secret that signs webhooks",
        operation_id="get_webhook_secret",
        response_model=None,
        responses={200: {"content": {"application/json": {}}}},
    )
    async def secret(request: Request) -> Response:
        """Return WEBHOOK_SECRET in the form of Standard Webhooks; only with an admin key where there are keys."""
        check_operator(caller_of(request))
        if not webhook_secret:
            raise NotFound("Webhooks are not signed here: WEBHOOK_SECRET is empty.")
        encoded = base64.b64encode(webhook_secret.encode()).decode()
        key = webhook_secret if webhook_secret.startswith(_STANDARD) else f"{_STANDARD}{encoded}"
        return JSONResponse({"key": key}, headers=_NO_STORE)
