"""How a request wants to be answered: by a job (RFC 7240), under an id, once for its idempotency key. Headers only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import Request

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import parse_int

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_KEY = re.compile(r"[!-~]{1,255}")
_MOST_SECONDS = 600


@dataclass(frozen=True, slots=True)
class RequestPreferences:
    """`wait` is how many seconds an asynchronous request would rather wait for its answer than be sent to a job."""

    respond_async: bool = False
    wait: float | None = None
    job_id: str | None = None
    key: str | None = None

    @property
    def applied(self) -> str:
        """What was honoured, for `Preference-Applied`."""
        return "respond-async" + ("" if self.wait is None else f", wait={self.wait:g}")


def preferences_of(request: Request) -> RequestPreferences:
    """The preferences in a request's headers. What cannot be read of `Prefer` is ignored, as RFC 7240 says.

    Raises `InvalidInput` for an id or a key no job or answer can have.
    """
    wanted: dict[str, str] = {}
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        wanted.setdefault(name.strip().lower(), value.strip().strip('"'))
    job_id, key = request.headers.get("x-job-id"), request.headers.get("idempotency-key")
    if job_id is not None and not _JOB_ID.fullmatch(job_id):
        raise InvalidInput("X-Job-ID must be 16 to 64 letters, digits, dashes or underscores.", field="X-Job-ID")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 printable characters.", field="Idempotency-Key")
    seconds = parse_int(wanted.get("wait", ""))
    wait = None if seconds is None else float(min(seconds, _MOST_SECONDS))
    return RequestPreferences("respond-async" in wanted, wait, job_id, key)
