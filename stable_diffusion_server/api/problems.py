"""What becomes of an error at a door, once for every door. Unknown errors stay opaque."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from stable_diffusion_server.api.error_bodies import frameworks_refusal, refusal
from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.api.middleware.security_headers import add_security_headers
from stable_diffusion_server.errors import ServerError

_log = structlog.get_logger(__name__)


def install_exception_handlers(app: FastAPI) -> None:
    """Have the app answer every error in the shape of the door it came from."""
    app.add_exception_handler(ServerError, _ours)
    app.add_exception_handler(HTTPException, _frameworks)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unknown)


def client_gone() -> Response:
    """The answer no one reads, with the status others log for it."""
    return Response(status_code=499)


def request_id_of(request: Request) -> str:
    """The id of a request, given by the caller or made when it came in."""
    return str(request.scope.get("state", {}).get("request_id", ""))


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)  # noqa: S101  # registered for this class alone; tells the type checker
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request failed", kind=error.kind, detail=error.detail, exc_info=error)
    elif error.status > HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.warning("request failed", kind=error.kind, detail=error.detail)
    request.scope["state"]["reason"] = error.kind
    return refusal(error, request.url.path, request_id_of(request))


async def _frameworks(request: Request, error: Exception) -> JSONResponse:
    """404, 405, 413 and their like, raised by the framework before a door is reached."""
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for this class alone; tells the type checker
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    request.scope["state"]["reason"] = status.phrase.lower().replace(" ", "-")
    return frameworks_refusal(status, str(error.detail), request.url.path, request_id_of(request), headers)


def _methods_at(request: Request) -> set[str]:
    """Every method of a path: each is a route of its own, and the framework names those of the first alone."""
    routers = [getattr(route, "original_router", None) for route in request.app.routes]
    routes = [route for router in routers if router is not None for route in router.routes]
    path = request.scope["path"]
    return {method for route in (*request.app.routes, *routes) if _is_at(route, path) for method in route.methods or ()}


def _is_at(route: object, path: str) -> bool:
    return isinstance(route, Route) and route.path_regex.match(path) is not None


async def _gone(request: Request, error: Exception) -> Response:
    """A client that left while it sent its body: nobody is told, and nothing is wrong here."""
    return client_gone()


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    _log.error("unexpected error", path=request.url.path, request_id=request_id_of(request), exc_info=error)
    opaque = ServerError("An unexpected error happened; the log has more under this request id.")
    answer = refusal(opaque, request.url.path, request_id_of(request))
    # It is answered outside of the gate, which else does this.
    start: dict[str, Any] = {"type": "http.response.start", "headers": answer.raw_headers}
    add_security_headers(start, request.url.path)
    answer.raw_headers = start["headers"]
    return answer
