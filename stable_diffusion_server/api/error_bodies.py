"""The shapes an error is told in: problem+json (RFC 9457), or that of the dialect of a path. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from stable_diffusion_server.api.json_responses import JSONResponse
from stable_diffusion_server.errors import ServerError

_PROBLEM = "application/problem+json"
# Seconds after which to come back where an error that passes does not say so itself.
_SOON = 5
# What OpenAI's clients look at: the type by status, where it is not that of a request that is at fault.
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


def refusal(error: ServerError, path: str, request_id: str) -> JSONResponse:
    """The answer that tells one of our errors at a path, with `Retry-After` where coming back can help."""
    headers: dict[str, str] = {}
    passes = error.retryable and error.status == HTTPStatus.SERVICE_UNAVAILABLE
    if (wait := _SOON if error.retry_after is None and passes else error.retry_after) is not None:
        headers["Retry-After"] = str(wait)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _answer({**problem_body(error), "request_id": request_id}, path, error.kind, headers)


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


def frameworks_refusal(
    status: HTTPStatus, detail: str, path: str, request_id: str, headers: Mapping[str, str]
) -> JSONResponse:
    """The same for what the framework refuses: 404, 405, 413 and their like."""
    body: dict[str, object] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": detail,
        "request_id": request_id,
    }
    return _answer(body, path, status.phrase.lower().replace(" ", "-"), headers)


def openai_error(body: Mapping[str, object], kind: str) -> dict[str, object]:
    """A problem in the shape of OpenAI's errors, as answers and events hold it."""
    status = HTTPStatus(int(str(body["status"])))
    other = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {
        "message": body["detail"],
        "type": _OPENAI_TYPES.get(status, other),
        "param": body.get("field"),
        "code": _OPENAI_CODES.get(kind, kind.replace("-", "_")),
    }


def _answer(body: dict[str, object], path: str, kind: str, headers: Mapping[str, str]) -> JSONResponse:
    headers = {**headers, "X-Request-ID": str(body["request_id"])}
    status, media_type = int(str(body["status"])), "application/json"
    if path.startswith(("/v1/images/", "/v1/models")):
        return JSONResponse(_printable({"error": openai_error(body, kind)}), status, headers, media_type)
    if path.startswith(("/sdapi/", "/internal/")):
        told = {"error": body["title"], "detail": body["detail"], "body": "", "errors": body.get("errors", "")}
        return JSONResponse(_printable({**told, "request_id": body["request_id"]}), status, headers, media_type)
    return JSONResponse(_printable(body), status, headers, _PROBLEM)


def _printable(value: object) -> object:
    """Text in a problem may quote the caller, lone surrogates included, which JSON in UTF-8 cannot carry."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list) else value
