"""Composition root: builds all components from the settings, and runs startup, warm-up and shutdown."""

from __future__ import annotations

from stable_diffusion_server.app.application import create_app
from stable_diffusion_server.app.commands import check_storage, draw_to_file, manage_dead_letters
from stable_diffusion_server.app.fetch_order import FetchOrder
from stable_diffusion_server.app.http_protocol import BoundedProtocol
from stable_diffusion_server.app.lifecycle import ProcessHooks
from stable_diffusion_server.app.model_commands import inspect_model, list_models, verify_models
from stable_diffusion_server.app.model_fetch import fetch_models
from stable_diffusion_server.app.process_tuning import ServingHooks, tune_malloc

__all__ = [
    "BoundedProtocol",
    "FetchOrder",
    "ProcessHooks",
    "ServingHooks",
    "check_storage",
    "create_app",
    "draw_to_file",
    "fetch_models",
    "inspect_model",
    "list_models",
    "manage_dead_letters",
    "tune_malloc",
    "verify_models",
]
