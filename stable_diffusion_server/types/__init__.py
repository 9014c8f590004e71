"""Domain types: frozen values for callers, requests, events and results, and their digests."""

from __future__ import annotations

from stable_diffusion_server.types.choices import (
    LORA_NAME_PATTERN,
    LORA_WEIGHT_MAX,
    NOISE_SEEDS,
    SEED_MAX,
    Extension,
    ExtraValue,
    Fill,
    Fit,
    ImageInput,
    MaskMode,
    PromptSyntax,
    Seed,
    Task,
    Tiling,
)
from stable_diffusion_server.types.requests import (
    Caller,
    DiffusionRequest,
    Format,
    GenerationRequest,
    ImageArray,
    diffusion_request_fields,
    digest,
    image_digest,
)
from stable_diffusion_server.types.results import (
    EngineEvent,
    EngineEventKind,
    GenerationProgress,
    GenerationResult,
    RequestWarning,
    StoredObject,
)

__all__ = [
    "LORA_NAME_PATTERN",
    "LORA_WEIGHT_MAX",
    "NOISE_SEEDS",
    "SEED_MAX",
    "Caller",
    "DiffusionRequest",
    "EngineEvent",
    "EngineEventKind",
    "Extension",
    "ExtraValue",
    "Fill",
    "Fit",
    "Format",
    "GenerationProgress",
    "GenerationRequest",
    "GenerationResult",
    "ImageArray",
    "ImageInput",
    "MaskMode",
    "PromptSyntax",
    "RequestWarning",
    "Seed",
    "StoredObject",
    "Task",
    "Tiling",
    "diffusion_request_fields",
    "digest",
    "image_digest",
]
