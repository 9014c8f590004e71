"""Adds middleware and routes to the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from ipaddress import ip_network

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers

from stable_diffusion_server.api import (
    AccessMiddleware,
    AccessPolicy,
    AgentEndpoint,
    AgentTools,
    BodyIntakeMiddleware,
    BodyLimitMiddleware,
    CrossOriginMiddleware,
    DialectContext,
    EncodedPreviews,
    FollowerLimiter,
    OriginPolicy,
    RequestDispatcher,
    TrustedProxies,
    allowed_host_names,
    automatic1111_router,
    docs_router,
    files_router,
    generate_router,
    history_router,
    install_openapi,
    jobs_router,
    models_router,
    openai_router,
    replay_router,
    replicate_router,
    verify_router,
)
from stable_diffusion_server.app.key_callers import build_keyring, rate_of
from stable_diffusion_server.app.model_manager import ModelManager
from stable_diffusion_server.app.model_state import ModelState
from stable_diffusion_server.app.services import ImageReaders
from stable_diffusion_server.app.storage import StorageStack
from stable_diffusion_server.generation import (
    DecodeImage,
    GenerationOptions,
    GenerationService,
    ImageUpscaler,
    PromptExpander,
    ReplayService,
    VerificationService,
)
from stable_diffusion_server.jobs import JobManager
from stable_diffusion_server.observability import Metrics, Tracing
from stable_diffusion_server.settings import Settings

_log = structlog.get_logger(__name__)


def add_middleware(
    app: FastAPI, settings: Settings, metrics: Metrics, tracing: Tracing, visitor_key: Callable[[Headers], str | None]
) -> None:
    """Add the middleware. The last added runs first: CORS (error responses need its headers), access, body limits."""
    policy = AccessPolicy(
        hosts=allowed_host_names(settings.host, settings.allowed_hosts, settings.public_base_url),
        origins=OriginPolicy(frozenset(settings.cors_origins), settings.allow_same_site),
        keys=build_keyring(settings),
        visitor_key=visitor_key,
        allow_anonymous=settings.allow_anonymous,
        rate=rate_of(settings.rate_limit),
        concurrency=settings.concurrency_limit,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_image_bytes=settings.max_image_bytes,
    )
    if policy.keys and policy.allow_anonymous:
        _log.warning("API_KEYS and ALLOW_ANONYMOUS=1 are both set: clients without a key may generate images too")
    proxies = TrustedProxies(tuple(ip_network(entry) for entry in settings.trusted_proxies))
    app.add_middleware(BodyLimitMiddleware, policy=policy)
    app.add_middleware(
        BodyIntakeMiddleware,
        policy=policy,
        seconds=settings.body_timeout,
        min_rate=settings.body_min_rate,
        max_bytes=settings.bodies_bytes,
    )
    app.add_middleware(
        AccessMiddleware, policy=policy, proxies=proxies, record_request=metrics.record_request, tracing=tracing
    )
    if settings.cors_origins:
        app.add_middleware(CrossOriginMiddleware, origins=settings.cors_origins)


def add_routes(
    app: FastAPI,
    settings: Settings,
    service: GenerationService,
    jobs: JobManager,
    stores: StorageStack,
    options: GenerationOptions,
    models: ModelState,
    decode: DecodeImage,
    manager: ModelManager,
    expander: PromptExpander,
    upscaler: ImageUpscaler,
) -> AgentEndpoint:
    """Add the routes of generation, jobs, files, history, the API documentation and agents; return that of agents."""
    url_of = stores.url_of
    dispatcher = RequestDispatcher(service, jobs, url_of, stores.base_of)
    app.include_router(generate_router(dispatcher, options.limits, url_of, get_generates=settings.get_generates))
    dialects = replace(build_dialect_context(settings, options, models, expander), upscaler=upscaler)
    app.include_router(models_router(dialects, manager))
    followers = FollowerLimiter(
        settings.event_streams, settings.event_streams_per_caller, settings.event_streams_per_job
    )
    secret = settings.webhook_secret.get_secret_value()
    app.include_router(replicate_router(jobs, dialects, url_of, stores.base_of, followers, secret))
    app.include_router(openai_router(service, dispatcher, dialects, url_of, decode))
    previews = EncodedPreviews()
    app.include_router(automatic1111_router(service, dispatcher, dialects, url_of, previews, decode, manager))
    app.include_router(jobs_router(jobs, url_of, followers, previews))
    app.include_router(files_router(stores.bucket, stores.library, stores.signer, stores.folder))
    app.include_router(history_router(stores.library, url_of))
    app.include_router(docs_router())

    def schedulers() -> dict[str, tuple[str, ...]]:
        return {name: facts.schedulers for name, facts in options.models.items()}

    keys = settings.read_keys()
    # Strangers read the document: it names no models where keys are limited to some.
    install_openapi(app, schedulers, keys_needed=bool(keys), names_models=not any(key.models for key in keys))
    tools = AgentTools(service, jobs, dialects, url_of, stores.base_of, followers, decode, settings.max_image_bytes)
    agents = AgentEndpoint(tools, app.version)
    app.router.add_route("/mcp", agents, include_in_schema=False)  # type: ignore[arg-type]  # an ASGI app, as routes take it
    return agents


def add_replay(
    app: FastAPI, service: GenerationService, stores: StorageStack, options: GenerationOptions, readers: ImageReaders
) -> None:
    """Add the routes that generate a stored image again, and that verify one where credentials can be read."""
    find, decoder = stores.library.find_by_digest, readers.decoder
    replays = ReplayService(service, decoder.decode, options, find)
    app.include_router(replay_router(replays, options.limits, stores.url_of))
    if find_spec("c2pa") is not None:
        verifications = VerificationService(
            readers.fetcher.fetch, decoder.handle_credentials, options.credentials, find, decoder.max_bytes
        )
        app.include_router(verify_router(verifications, options.limits, stores.url_of))


def build_dialect_context(
    settings: Settings, options: GenerationOptions, models: ModelState, expander: PromptExpander
) -> DialectContext:
    """Return the server's limits, models and names for the OpenAI and AUTOMATIC1111 routes."""
    pairs = (entry.partition("=") for entry in settings.model_aliases)
    return DialectContext(
        limits=options.limits,
        models=options.models,
        default_model=options.default_model,
        aliases={alias: model or options.default_model for alias, _, model in pairs},
        max_n=settings.max_n,
        max_response_bytes=settings.max_response_bytes,
        loras=lambda: options.loras(),
        embeddings=models.listed_embeddings,
        device_memory=models.memory,
        status_of=models.status_of,
        response_format=settings.openai_response_format,
        expander=expander,
        detector=options.detector,
        controlnets=options.controlnets,
        preprocessor=options.preprocessor,
        image_prompts=options.image_prompts,
    )
