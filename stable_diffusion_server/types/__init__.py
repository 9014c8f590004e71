"""Domain types: frozen values for callers, requests, events and results, and their digests."""

from __future__ import annotations

from stable_diffusion_server.types.caller import Caller
from stable_diffusion_server.types.diffusion import (
    DiffusionRequest,
    ImageArray,
    diffusion_request_fields,
    digest,
    image_digest,
)
from stable_diffusion_server.types.events import EngineEvent, EngineEventKind, GenerationProgress
from stable_diffusion_server.types.requests import (
    LORA_NAME_PATTERN,
    LORA_WEIGHT_MAX,
    SEED_MAX,
    Fill,
    Fit,
    Format,
    GenerationRequest,
    ImageInput,
    Seed,
    Task,
)
from stable_diffusion_server.types.results import GenerationResult, RequestWarning, StoredObject

__all__ = [
    "LORA_NAME_PATTERN",
    "LORA_WEIGHT_MAX",
    "SEED_MAX",
    "Caller",
    "DiffusionRequest",
    "EngineEvent",
    "EngineEventKind",
    "Fill",
    "Fit",
    "Format",
    "GenerationProgress",
    "GenerationRequest",
    "GenerationResult",
    "ImageArray",
    "ImageInput",
    "RequestWarning",
    "Seed",
    "StoredObject",
    "Task",
    "diffusion_request_fields",
    "digest",
    "image_digest",
]
