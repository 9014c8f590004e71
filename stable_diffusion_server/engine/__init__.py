"""Device scheduling: a fair request queue, and worker threads that batch requests per denoising step."""

from __future__ import annotations

from stable_diffusion_server.engine.engine import Engine
from stable_diffusion_server.engine.interface import (
    Denoiser,
    DenoiserCapabilities,
    DenoisingState,
    EngineResult,
    EngineState,
    LoadStopped,
)
from stable_diffusion_server.engine.ticket import Ticket

__all__ = [
    "Denoiser",
    "DenoiserCapabilities",
    "DenoisingState",
    "Engine",
    "EngineResult",
    "EngineState",
    "LoadStopped",
    "Ticket",
]
