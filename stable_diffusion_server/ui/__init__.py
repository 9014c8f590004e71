"""Web UI: Gradio pages that call the server's own HTTP API."""

from __future__ import annotations

from stable_diffusion_server.ui.app import LazyUiApp
from stable_diffusion_server.ui.asgi_transport import StreamingASGITransport
from stable_diffusion_server.ui.client import COOKIE, ApiClients
from stable_diffusion_server.ui.image_intake import DecodeUpload, ImageIntake, UploadRoutes
from stable_diffusion_server.ui.sessions import SessionStore
from stable_diffusion_server.ui.static_pages import favicon
from stable_diffusion_server.ui.upload_store import UploadLimits, UploadStore

__all__ = [
    "COOKIE",
    "ApiClients",
    "DecodeUpload",
    "ImageIntake",
    "LazyUiApp",
    "SessionStore",
    "StreamingASGITransport",
    "UploadLimits",
    "UploadRoutes",
    "UploadStore",
    "favicon",
]
