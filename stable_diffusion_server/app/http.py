"""Sets the doors into the app, and before them what every request passes."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_network

import limits as rates
import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware

from stable_diffusion_server.api.automatic1111 import routes as sdapi
from stable_diffusion_server.api.dialect_context import House
from stable_diffusion_server.api.dispatch import Answering
from stable_diffusion_server.api.event_stream import Followers
from stable_diffusion_server.api.middleware.access import BodyLimit, Gate
from stable_diffusion_server.api.middleware.access_policy import Policy, allowed_host_names
from stable_diffusion_server.api.middleware.api_keys import Key, Keyring, hashed
from stable_diffusion_server.api.middleware.body_intake import BodyIntake
from stable_diffusion_server.api.middleware.origins import Origins
from stable_diffusion_server.api.middleware.proxy_headers import Proxies
from stable_diffusion_server.api.openai import routes
from stable_diffusion_server.api.openapi import docs_page, document
from stable_diffusion_server.api.previews import EncodedPreviews
from stable_diffusion_server.api.routes import files, generate, history, replay
from stable_diffusion_server.api.routes import jobs as job_doors
from stable_diffusion_server.app.storage import Stores
from stable_diffusion_server.generation.interfaces import Decode
from stable_diffusion_server.generation.replay import Replays
from stable_diffusion_server.generation.resolver import Options
from stable_diffusion_server.generation.service import Service
from stable_diffusion_server.jobs.manager import Jobs
from stable_diffusion_server.observability.metrics import Metrics
from stable_diffusion_server.observability.tracing import Tracing
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller

_log = structlog.get_logger(__name__)


def add_middleware(
    app: FastAPI, settings: Settings, metrics: Metrics, tracing: Tracing, visitor_key: Callable[[Headers], str | None]
) -> None:
    """What every request passes, the last added first: CORS (refusals need its headers), gate, intake and count."""
    policy = Policy(
        hosts=allowed_host_names(settings.host, settings.allowed_hosts, settings.public_base_url),
        origins=Origins(frozenset(settings.cors_origins), settings.allow_same_site),
        keys=build_keyring(settings),
        visitor_key=visitor_key,
        allow_anonymous=settings.allow_anonymous,
        rate=_rate(settings.rate_limit),
        concurrency=settings.concurrency_limit,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_image_bytes=settings.max_image_bytes,
    )
    if policy.keys and policy.allow_anonymous:
        _log.warning("API_KEYS and ALLOW_ANONYMOUS=1 are both set: clients without a key may draw, as strangers")
    proxies = Proxies(tuple(ip_network(entry) for entry in settings.trusted_proxies))
    app.add_middleware(BodyLimit, policy=policy)
    app.add_middleware(
        BodyIntake,
        policy=policy,
        seconds=settings.body_timeout,
        min_rate=settings.body_min_rate,
        max_bytes=settings.bodies_bytes,
    )
    app.add_middleware(Gate, policy=policy, proxies=proxies, visited=metrics.visited, tracing=tracing)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                *("Authorization", "Content-Type", "X-API-Key", "X-Request-ID"),
                *("Prefer", "Idempotency-Key", "Last-Event-ID", "X-Job-ID"),
            ],
            expose_headers=[
                *("X-Request-ID", "Retry-After", "Location", "Content-Location", "X-Warnings", "Preference-Applied"),
                *("X-Job-ID", "Idempotency-Replayed"),
                *("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "RateLimit-Policy"),
            ],
        )


def add_doors(app: FastAPI, settings: Settings, service: Service, jobs: Jobs, stores: Stores, options: Options) -> None:
    """The doors that draw, those to jobs, and those to what was drawn."""
    url_of = stores.url_of
    answering = Answering(service, jobs, url_of, stores.base_of)
    app.include_router(generate.router(answering, options.limits, url_of, get_generates=settings.get_generates))
    house = build_house(settings, options)
    app.include_router(routes.router(service, answering, house, url_of))
    previews = EncodedPreviews()
    followers = Followers(settings.followers, settings.followers_per_caller, settings.followers_per_job)
    app.include_router(sdapi.router(service, house, url_of, previews))
    app.include_router(job_doors.router(jobs, url_of, followers, previews))
    app.include_router(files.router(stores.bucket, stores.shelf, stores.signer, stores.folder))
    app.include_router(history.router(stores.shelf, url_of))
    app.include_router(docs_page.router())

    def schedulers() -> dict[str, tuple[str, ...]]:
        return {name: facts.schedulers for name, facts in options.models.items()}

    document.install(app, schedulers, keys_needed=bool(settings.read_keys()))


def add_replay(app: FastAPI, service: Service, stores: Stores, options: Options, decode: Decode) -> None:
    """The door that draws a picture again."""
    replays = Replays(service, decode, options, stores.shelf.entry_of)
    app.include_router(replay.router(replays, options.limits, stores.url_of))


def build_house(settings: Settings, options: Options) -> House:
    """What the dialects' doors know of the server."""
    pairs = (entry.partition("=") for entry in settings.model_aliases)
    return House(
        limits=options.limits,
        models=options.models,
        default_model=options.default_model,
        aliases={alias: model or options.default_model for alias, _, model in pairs},
        max_n=settings.max_n,
        max_response_bytes=settings.max_response_bytes,
        loras=lambda: options.loras(),
    )


def build_keyring(settings: Settings) -> Keyring:
    """The keys of the settings, their secrets hashed."""
    return Keyring(
        Key(
            Caller(key.name, key.prefix, key.admin),
            hashed(key.secret.get_secret_value()),
            _rate(key.rate),
            key.concurrency,
        )
        for key in settings.read_keys()
    )


def _rate(written: str) -> rates.RateLimitItem | None:
    return rates.parse(written) if written else None
