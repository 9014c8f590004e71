"""Settings: typed, with defaults and descriptions, read once from the environment."""

from __future__ import annotations

from stable_diffusion_server.settings.loader import (
    SettingsError,
    configure_gradio,
    describe_settings,
    read_settings,
    set_compiler_cache,
)
from stable_diffusion_server.settings.server import Settings

__all__ = [
    "Settings",
    "SettingsError",
    "configure_gradio",
    "describe_settings",
    "read_settings",
    "set_compiler_cache",
]
