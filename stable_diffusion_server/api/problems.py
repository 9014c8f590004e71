"""Exception handlers and error bodies: problem+json (RFC 9457), or the format of the dialect of the path."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import structlog
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from stable_diffusion_server.api.dialect_paths import is_openai_path, openai_hint
from stable_diffusion_server.api.http_responses import JSONResponse, add_security_headers, client_closed_request
from stable_diffusion_server.api.schemas.responses import (
    Automatic1111ErrorBody,
    OpenAIErrorBody,
    OpenAIErrorDetailsBody,
    ProblemBody,
    StoredProblemBody,
    problem_body,
)
from stable_diffusion_server.errors import InvalidInput, ServerError

_log = structlog.get_logger(__name__)

_PROBLEM = "application/problem+json"
# Paths of AUTOMATIC1111's API, of its ControlNet extension, and of the Gradio page below it.
_AUTOMATIC1111_ROOTS = ("/sdapi/", "/internal/", "/controlnet/", "/adetailer/")
_AUTOMATIC1111_PATHS = ("/config", "/user", "/app_id")
# Default `Retry-After` of temporary errors, in seconds.
_RETRY_SECONDS = 5
# Error types of OpenAI by status; other statuses are an invalid request or a server error.
_OPENAI_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_OPENAI_CODES = {
    "unauthorized": "invalid_api_key",
    "rate-limited": "rate_limit_exceeded",
    "invalid-input": "invalid_value",
}


def install_exception_handlers(app: FastAPI) -> None:
    """Make the app answer every error in the format of the dialect of the path. Unknown errors stay opaque."""
    app.add_exception_handler(ServerError, _handle_server_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_exception_handler(Exception, _handle_unknown_error)


def is_automatic1111_path(path: str) -> bool:
    """Return whether errors at a path have AUTOMATIC1111's format."""
    return path.startswith(_AUTOMATIC1111_ROOTS) or path in _AUTOMATIC1111_PATHS


def error_response(error: ServerError, path: str, request_id: str) -> JSONResponse:
    """Return the response for an error at a path, with `Retry-After` where retrying can help."""
    headers: dict[str, str] = {}
    temporary = error.retryable and error.status == HTTPStatus.SERVICE_UNAVAILABLE
    if (wait := _RETRY_SECONDS if error.retry_after is None and temporary else error.retry_after) is not None:
        headers["Retry-After"] = str(wait)
    if error.status == HTTPStatus.UNAUTHORIZED:
        # AUTOMATIC1111's clients send a key as the password of HTTP Basic, some only after a challenge that names it.
        basic = is_automatic1111_path(path)
        headers["WWW-Authenticate"] = 'Basic realm="stable-diffusion-server"' if basic else "Bearer"
    body: ProblemBody = {**problem_body(error), "request_id": request_id}
    return _response(body, path, error.kind, headers)


def response_without_request(error: ServerError) -> JSONResponse:
    """Return the response for an error of a request whose path could not be read, with a new id and all headers."""
    request_id = uuid4().hex
    response = error_response(error, "", request_id)
    response.headers["X-Request-ID"] = request_id
    start: dict[str, Any] = {"headers": response.raw_headers}
    add_security_headers(start, "")
    response.raw_headers = start["headers"]
    return response


def openai_error(body: StoredProblemBody, kind: str) -> OpenAIErrorDetailsBody:
    """Return a problem in the format of OpenAI's errors, for responses and events."""
    status = HTTPStatus(body["status"])
    other = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {
        "message": body["detail"],
        "type": _OPENAI_TYPES.get(status, other),
        "param": body.get("field"),
        "code": _OPENAI_CODES.get(kind, kind.replace("-", "_")),
    }


def request_id_of(request: Request) -> str:
    """Return the id of a request, which the client or the access middleware set."""
    return str(request.scope.get("state", {}).get("request_id", ""))


async def _handle_server_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)  # noqa: S101  # registered for this class alone; narrows the type
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request failed", kind=error.kind, detail=error.detail, exc_info=error)
    elif error.status > HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.warning("request failed", kind=error.kind, detail=error.detail)
    request.scope["state"]["reason"] = error.kind
    return error_response(error, request.url.path, request_id_of(request))


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    """Answer errors that the framework raises before it calls a route: 404, 405, 413 and others.

    OPTIONS is such a 405, and no error: some clients ask by it whether the server is there.
    """
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for this class alone; narrows the type
    status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    path, detail = request.url.path, str(error.detail)
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        methods = _methods_at(request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": ", ".join(sorted({*methods, "OPTIONS"}))})
        headers["Allow"] = ", ".join(sorted(methods))
    if status is HTTPStatus.NOT_FOUND and is_openai_path(path):
        detail = openai_hint(path)
    kind = status.phrase.lower().replace(" ", "-")
    request.scope["state"]["reason"] = kind
    body: ProblemBody = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": detail,
        "request_id": request_id_of(request),
    }
    return _response(body, path, kind, headers)


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    """Answer a client that disconnected while it sent its body; this is not a server error."""
    return client_closed_request()


def unexpected_response(error: Exception, path: str, request_id: str) -> JSONResponse:
    """Log an error that nothing expects, and return an opaque response for it."""
    _log.error("unexpected error", path=path, request_id=request_id, exc_info=error)
    opaque = ServerError("An unexpected error happened; the log has more under this request id.")
    return error_response(opaque, path, request_id)


async def _handle_unknown_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of the middleware itself; the access middleware answers those of the routes."""
    response = unexpected_response(error, request.url.path, request_id_of(request))
    start: dict[str, Any] = {"type": "http.response.start", "headers": response.raw_headers}
    add_security_headers(start, request.url.path)
    response.raw_headers = start["headers"]
    return response


def _response(body: ProblemBody, path: str, kind: str, headers: Mapping[str, str]) -> JSONResponse:
    headers = {**headers, "X-Request-ID": body["request_id"]}
    if is_openai_path(path):
        openai: OpenAIErrorBody = {"error": openai_error(body, kind)}
        status = HTTPStatus.BAD_REQUEST if kind == InvalidInput.kind else body["status"]
        return JSONResponse(_encodable(openai), status, headers)
    if is_automatic1111_path(path):
        automatic1111: Automatic1111ErrorBody = {
            "error": body["title"],
            "detail": body["detail"],
            "body": "",
            "errors": body.get("errors", ""),
            "request_id": body["request_id"],
        }
        return JSONResponse(_encodable(automatic1111), body["status"], headers)
    return JSONResponse(_encodable(body), body["status"], headers, _PROBLEM)


def _encodable(value: object) -> object:
    """Replace lone surrogates: an error may quote them from the request, and UTF-8 cannot encode them."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(k): _encodable(v) for k, v in value.items()}
    return [_encodable(v) for v in value] if isinstance(value, list) else value


def _methods_at(request: Request) -> set[str]:
    """Return all methods of a path.

    Each method is a separate route, and Starlette reports the methods of the first route only.
    """
    routers = [getattr(route, "original_router", None) for route in request.app.routes]
    routes = [route for router in routers if router is not None for route in router.routes]
    path = request.scope["path"]
    return {method for route in (*request.app.routes, *routes) if _is_at(route, path) for method in route.methods or ()}


def _is_at(route: object, path: str) -> bool:
    return isinstance(route, Route) and route.path_regex.match(path) is not None
