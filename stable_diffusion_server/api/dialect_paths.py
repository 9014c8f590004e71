"""Paths of the OpenAI routes: which errors have OpenAI's format, and a hint for unknown paths."""

from __future__ import annotations

import re

# A longer path is none of them.
_LONGEST = 1000
_SLASHES = re.compile(r"/{2,}")
_IMAGES = ("/images/generations", "/images/edits", "/images/variations")
# Ends of OpenAI's paths that this server does not have.
_OTHER_ENDS = (
    "/chat/completions",
    "/completions",
    "/responses",
    "/embeddings",
    "/moderations",
    "/audio/speech",
    "/audio/transcriptions",
)
# Paths of this server's own API and of Replicate's with the prefix of OpenAI's.
_NATIVE = ("/v1/replay", "/v1/verify", "/v1/predictions", "/v1/webhooks/", "/v1/files")
_PREDICTIONS, _VERSIONS = "/predictions", "/versions/"
# Below these, other parts of the server answer in their own format.
_OTHER_DIALECTS = ("/sdapi/", "/internal/", "/controlnet/", "/adetailer/", "/ui/", "/files/", "/jobs/", "/history/")


def is_openai_path(path: str) -> bool:
    """Return whether errors at a path have OpenAI's format: all of `/v1`, and paths that end like one of OpenAI's."""
    if path.startswith("/v1/"):
        return not (path.startswith(_NATIVE) or is_model_of_replicate(path))
    if len(path) > _LONGEST or path.startswith(_OTHER_DIALECTS):
        return False
    return _plain(path).endswith((*_IMAGES, *_OTHER_ENDS, "/models"))


def is_model_of_replicate(path: str) -> bool:
    """Return whether a path below `/v1/models` is one of Replicate's: it makes a prediction, or reads a version."""
    head, versions, last = path.rpartition(_VERSIONS)
    return path.startswith("/v1/models/") and (
        path.endswith(_PREDICTIONS) or bool(versions and head and "/" not in last)
    )


def openai_hint(path: str) -> str:
    """Return a sentence that names the right path, for a path with OpenAI's format and without a route."""
    shown = path[:100]
    for end in (*_IMAGES, "/models"):
        if _plain(path[:_LONGEST]).endswith(end):
            return f"There is nothing at {shown}; the API is at /v1{end}."
    return (
        f"There is nothing at {shown}; this server makes images, at /v1/images/generations, /v1/images/edits and "
        "/v1/images/variations, and lists its models at /v1/models."
    )


def _plain(path: str) -> str:
    return _SLASHES.sub("/", path).rstrip("/")
