"""HTTP: native routes, dialects of OpenAI, AUTOMATIC1111 and Replicate, middleware, OpenAPI, error responses."""

from __future__ import annotations

from stable_diffusion_server.api.agents.endpoint import AgentEndpoint
from stable_diffusion_server.api.agents.tools import AgentTools
from stable_diffusion_server.api.automatic1111.routes import automatic1111_router
from stable_diffusion_server.api.base64_images import EncodedPreviews
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.api.dispatch import RequestDispatcher
from stable_diffusion_server.api.http_responses import FollowerLimiter
from stable_diffusion_server.api.middleware.access import AccessMiddleware, BodyLimitMiddleware
from stable_diffusion_server.api.middleware.access_policy import AccessPolicy, OriginPolicy, allowed_host_names
from stable_diffusion_server.api.middleware.api_keys import ApiKeyring, HashedApiKey, hashed
from stable_diffusion_server.api.middleware.body_intake import BodyIntakeMiddleware
from stable_diffusion_server.api.middleware.cors import CrossOriginMiddleware
from stable_diffusion_server.api.middleware.proxy_headers import TrustedProxies
from stable_diffusion_server.api.openai.routes import openai_router
from stable_diffusion_server.api.openapi.docs_page import docs_router
from stable_diffusion_server.api.openapi.document import install_openapi
from stable_diffusion_server.api.openapi.markdown import openapi_markdown
from stable_diffusion_server.api.problems import install_exception_handlers, response_without_request
from stable_diffusion_server.api.replicate.predictions import webhook_message
from stable_diffusion_server.api.replicate.routes import replicate_router
from stable_diffusion_server.api.routes.files import files_router
from stable_diffusion_server.api.routes.generate import generate_router
from stable_diffusion_server.api.routes.health import health_router
from stable_diffusion_server.api.routes.history import history_router
from stable_diffusion_server.api.routes.jobs import jobs_router
from stable_diffusion_server.api.routes.models import models_router
from stable_diffusion_server.api.routes.replay import replay_router
from stable_diffusion_server.api.routes.verify import verify_router
from stable_diffusion_server.api.schemas.responses import job_body

__all__ = [
    "AccessMiddleware",
    "AccessPolicy",
    "AgentEndpoint",
    "AgentTools",
    "ApiKeyring",
    "BodyIntakeMiddleware",
    "BodyLimitMiddleware",
    "CrossOriginMiddleware",
    "DialectContext",
    "EncodedPreviews",
    "FollowerLimiter",
    "HashedApiKey",
    "OriginPolicy",
    "RequestDispatcher",
    "TrustedProxies",
    "allowed_host_names",
    "automatic1111_router",
    "docs_router",
    "files_router",
    "generate_router",
    "hashed",
    "health_router",
    "history_router",
    "install_exception_handlers",
    "install_openapi",
    "job_body",
    "jobs_router",
    "models_router",
    "openai_router",
    "openapi_markdown",
    "replay_router",
    "replicate_router",
    "response_without_request",
    "verify_router",
    "webhook_message",
]
