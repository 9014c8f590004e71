"""The caller of a request, and the part of the bucket that the caller may write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastapi import Request

from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.types import Caller, GenerationRequest

# Makes the URL of an object key as the client of a request can reach it.
UrlOf = Callable[[Request, str], str]


def caller_of(request: Request) -> Caller:
    """Return the caller that the access middleware identified."""
    caller = request.scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller(anonymous=True)


def scope_to_caller(caller: Caller, generation: GenerationRequest) -> GenerationRequest:
    """Return the request with its object key inside the prefix of its caller.

    Raises `Forbidden` for a key outside of that prefix, and for an anonymous request with `overwrite`.
    """
    if caller.anonymous and generation.overwrite:
        raise Forbidden("Without a key nothing is overwritten.", field="overwrite")
    generation = replace(generation, named_for=caller.name or ("anonymous" if caller.anonymous else ""))
    if not caller.prefix:
        return generation
    if generation.save_path is None:
        return replace(generation, folder=caller.prefix)
    if not generation.save_path.startswith(caller.prefix):
        raise Forbidden(f"With this key names begin with {caller.prefix}.", field="save_path")
    return generation
