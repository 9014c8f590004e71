"""Outbound HTTP to URLs that callers name, safe against server-side request forgery (SSRF)."""

from __future__ import annotations

from stable_diffusion_server.net.image_fetcher import FetchLimits, ImageFetcher
from stable_diffusion_server.net.url_policy import AllowedTarget
from stable_diffusion_server.net.webhook_client import WebhookClient

__all__ = [
    "AllowedTarget",
    "FetchLimits",
    "ImageFetcher",
    "WebhookClient",
]
