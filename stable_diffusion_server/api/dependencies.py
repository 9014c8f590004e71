"""What an order may name, by who asks for it. Knows no keys."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request

from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.types import Caller, GenerationRequest


def caller_of(request: Request) -> Caller:
    """Who asks, as the gate found out."""
    caller = request.scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller(anonymous=True)


def scope_to_caller(caller: Caller, order: GenerationRequest) -> GenerationRequest:
    """The order, kept to the part of the bucket its caller may write.

    Raises `Forbidden` for a name outside of it, and for an anonymous caller who would overwrite.
    """
    if caller.anonymous and order.overwrite:
        raise Forbidden("Without a key nothing is overwritten.", field="overwrite")
    order = replace(order, named_for=caller.name or ("anonymous" if caller.anonymous else ""))
    if not caller.prefix:
        return order
    if order.save_path is None:
        return replace(order, folder=caller.prefix)
    if not order.save_path.startswith(caller.prefix):
        raise Forbidden(f"With this key names begin with {caller.prefix}.", field="save_path")
    return order
