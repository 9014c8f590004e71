"""Request headers that choose the kind of response: `Prefer` (RFC 7240), `X-Job-ID` and `Idempotency-Key`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastapi import Request

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import parse_int

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")
_KEY = re.compile(r"[!-~]{1,255}")
_WAIT_MAX_SECONDS = 600


@dataclass(frozen=True, slots=True)
class RequestPreferences:
    """`wait`: seconds that an asynchronous request waits for its result before the server answers with the job."""

    respond_async: bool = False
    wait: float | None = None
    job_id: str | None = None
    key: str | None = None

    @property
    def applied(self) -> str:
        """Return the value of `Preference-Applied`."""
        return "respond-async" + ("" if self.wait is None else f", wait={self.wait:g}")


def preferences_of(request: Request) -> RequestPreferences:
    """Read the preferences in the headers of a request. Ignores invalid preferences, as RFC 7240 requires.

    Raises `InvalidInput` for an invalid `X-Job-ID` or `Idempotency-Key`.
    """
    preferences: dict[str, str] = {}
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
    job_id, key = request.headers.get("x-job-id"), request.headers.get("idempotency-key")
    if job_id is not None and not _JOB_ID.fullmatch(job_id):
        raise InvalidInput("X-Job-ID must be 16 to 64 letters, digits, dashes or underscores.", field="X-Job-ID")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 printable characters.", field="Idempotency-Key")
    seconds = parse_int(preferences.get("wait", ""))
    wait = None if seconds is None else float(min(seconds, _WAIT_MAX_SECONDS))
    return RequestPreferences("respond-async" in preferences, wait, job_id, key)
