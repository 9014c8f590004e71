"""Diffusion: loads models and generates images. The only package that imports torch.

This face imports no torch: it exports the catalogue, the model library, the LoRA folder and the hub client.
`registry` loads the rest.
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
from stable_diffusion_server.pipelines.library import (
    FileIdentity,
    LibraryModel,
    ModelLibrary,
    OwnerSpec,
    identify,
    identity_as_dict,
    read_spec,
    spec_path,
)
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError, check_pipeline_folder
from stable_diffusion_server.pipelines.model_spec import ModelSpec, ModelTable, known_names
from stable_diffusion_server.pipelines.owned_models import OwnedModels, find_owned_models

__all__ = [
    "MODELS",
    "REAL_MODELS",
    "SCHEDULERS",
    "FileIdentity",
    "HubClient",
    "LibraryModel",
    "LoraFolder",
    "ModelLibrary",
    "ModelSpec",
    "ModelTable",
    "OwnedModels",
    "OwnerSpec",
    "WeightDigests",
    "WeightFileError",
    "check_pipeline_folder",
    "check_strength",
    "choose_models",
    "find_owned_models",
    "identify",
    "identity_as_dict",
    "known_names",
    "read_spec",
    "scheduler_of",
    "spec_of",
    "spec_path",
    "with_lcm",
    "with_quantization",
    "without_identity",
]
