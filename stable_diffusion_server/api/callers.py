"""Who asks, as the gate found out. Knows no keys."""

from __future__ import annotations

from fastapi import Request

from stable_diffusion_server.orders import Caller


def caller_of(request: Request) -> Caller:
    """Who asks, as the gate found out."""
    caller = request.scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller()
