"""An error as the answer that tells it (RFC 9457), for what the UI refuses itself."""

from __future__ import annotations

from starlette.responses import JSONResponse

from stable_diffusion_server.errors import ServerError


def problem(error: ServerError) -> JSONResponse:
    """The answer for one of our errors."""
    body: dict[str, object] = {
        "type": f"urn:stable-diffusion-server:problem:{error.kind}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }
    if error.field:
        body |= {"field": error.field, "errors": [{"field": name, "detail": text} for name, text in error.faults]}
    headers = {"Cache-Control": "no-store"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(body, error.status, headers, media_type="application/problem+json")
