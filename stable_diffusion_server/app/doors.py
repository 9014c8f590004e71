"""Puts what every request passes before the doors."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from stable_diffusion_server.api.security import BodyLimit, Gate, Policy, allowed_host_names
from stable_diffusion_server.settings import Settings


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """What every request passes, the last added first: CORS (refusals need its headers), gate, count of bytes."""
    policy = Policy(
        hosts=allowed_host_names(settings.host, settings.allowed_hosts, settings.public_base_url),
        origins=frozenset(settings.cors_origins),
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
        allow_anonymous=settings.allow_anonymous,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
    )
    app.add_middleware(BodyLimit, policy=policy)
    app.add_middleware(Gate, policy=policy)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
