"""Diffusion: loads models and generates images. The only package that imports torch.

This face imports no torch: it exports the catalogue, the LoRA folder and the hub client. `registry` loads the rest.
"""

from __future__ import annotations

from stable_diffusion_server.pipelines.catalog import (
    MODELS,
    REAL_MODELS,
    SCHEDULERS,
    check_strength,
    choose_models,
    scheduler_of,
    spec_of,
    with_lcm,
    with_quantization,
    without_identity,
)
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.model_spec import ModelSpec

__all__ = [
    "MODELS",
    "REAL_MODELS",
    "SCHEDULERS",
    "HubClient",
    "LoraFolder",
    "ModelSpec",
    "WeightDigests",
    "check_strength",
    "choose_models",
    "scheduler_of",
    "spec_of",
    "with_lcm",
    "with_quantization",
    "without_identity",
]
