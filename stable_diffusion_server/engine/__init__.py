"""Owns the device: a waiting line, and lanes that step jobs through it together. Knows time, and no diffusion."""

from __future__ import annotations

from stable_diffusion_server.engine.engine import Engine
from stable_diffusion_server.engine.interface import (
    Denoiser,
    DenoiserCapabilities,
    DenoisingState,
    EngineResult,
    EngineState,
)
from stable_diffusion_server.engine.ticket import Ticket

__all__ = [
    "Denoiser",
    "DenoiserCapabilities",
    "DenoisingState",
    "Engine",
    "EngineResult",
    "EngineState",
    "Ticket",
]
