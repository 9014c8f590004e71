"""Settings: typed, with defaults and descriptions, read from the environment once."""

from __future__ import annotations

from stable_diffusion_server.settings.library_env import keep_compiled, quieten_gradio
from stable_diffusion_server.settings.loader import SettingsError, describe_settings, read_settings
from stable_diffusion_server.settings.server import Settings

__all__ = [
    "Settings",
    "SettingsError",
    "describe_settings",
    "keep_compiled",
    "quieten_gradio",
    "read_settings",
]
