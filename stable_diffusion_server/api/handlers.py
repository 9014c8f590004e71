"""Errors to problem+json (RFC 9457), once for every door. Unknown errors stay opaque."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stable_diffusion_server.errors import ServerError

_log = structlog.get_logger(__name__)


def install(app: FastAPI) -> None:
    """Have the app answer every error as a problem."""
    app.add_exception_handler(ServerError, _ours)
    app.add_exception_handler(HTTPException, _frameworks)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unknown)


def problem(error: ServerError, request_id: str) -> JSONResponse:
    """The problem document of one of our errors, with `Retry-After` where coming back can help."""
    body = {**problem_body(error), "request_id": request_id}
    headers = {"X-Request-ID": request_id}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_printable(body), error.status, headers, media_type="application/problem+json")


def problem_body(error: ServerError) -> dict[str, object]:
    """One of our errors as the members of a problem document."""
    body: dict[str, object] = {
        "type": f"urn:stable-diffusion-server:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.field:
        body["field"] = error.field
    if error.faults:
        body["errors"] = [{"field": field, "detail": detail} for field, detail in error.faults]
    return body


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
    return problem(error, request_id_of(request))


async def _frameworks(request: Request, error: Exception) -> JSONResponse:
    """404, 405, 413 and their like, raised by the framework before a door is reached."""
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for this class alone; tells the type checker
    status = HTTPStatus(error.status_code)
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": error.detail,
        "request_id": request_id_of(request),
    }
    headers = {**(error.headers or {}), "X-Request-ID": request_id_of(request)}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


async def _gone(request: Request, error: Exception) -> Response:
    """A client that left while it sent its body: nobody is told, and nothing is wrong here."""
    return client_gone()


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    _log.error("unexpected error", path=request.url.path, request_id=request_id_of(request), exc_info=error)
    opaque = ServerError("An unexpected error happened; the log has more under this request id.")
    return problem(opaque, request_id_of(request))


def _printable(value: object) -> object:
    """Text in a problem may quote the caller, lone surrogates included, which JSON in UTF-8 cannot carry."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list) else value
