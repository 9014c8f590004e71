"""Diffusion: loads models and generates images. The only package that imports torch.

This face imports no torch: it exports the catalogue, the model library, the folders of LoRAs, embeddings, image
prompt files and ControlNets, and the hub client. `registry` loads the rest.
"""

from __future__ import annotations

from stable_diffusion_server.pipelines.catalog import (
    MODELS,
    REAL_MODELS,
    check_strength,
    choose_models,
    scheduler_of,
    spec_of,
    with_lcm,
    with_quantization,
    without_identity,
)
from stable_diffusion_server.pipelines.conditioning.controlnet_folder import ControlNetFacts, ControlNetFolder
from stable_diffusion_server.pipelines.conditioning.embedding_files import CLIP_G, CLIP_L, Embedding
from stable_diffusion_server.pipelines.conditioning.embedding_folder import EmbeddingFolder, EmbeddingList
from stable_diffusion_server.pipelines.conditioning.lora_folder import LoraFolder
from stable_diffusion_server.pipelines.library import (
    FileIdentity,
    Kind,
    LibraryModel,
    ModelLibrary,
    OwnerSpec,
    folder_for,
    header_size,
    identify,
    identify_beginning,
    identity_as_dict,
    pin_origin,
    read_spec,
    refusal_of_name,
    spec_path,
)
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.hub_listing import (
    HubListing,
    files_of_network,
    files_of_repository,
    hub_headers,
    hub_page,
    hub_refusal,
    list_repository,
    why_refused,
)
from stable_diffusion_server.pipelines.loading.image_prompt_folder import ImagePromptFile, ImagePromptFolder
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError, check_pipeline_folder
from stable_diffusion_server.pipelines.model_spec import (
    CHUNK_TOKENS,
    MOST_CHUNKS,
    TRUE_GUIDANCE,
    ExtraParameter,
    ModelSpec,
    ModelTable,
    known_names,
)
from stable_diffusion_server.pipelines.owned_models import OwnedModels, find_owned_models
from stable_diffusion_server.pipelines.sampling_options import (
    SAMPLING_NUMBERS,
    SAMPLING_OPTIONS,
    resolve_sampling,
    schedule_named,
)
from stable_diffusion_server.pipelines.scheduler_rows import SCHEDULERS, SCHEDULES
from stable_diffusion_server.pipelines.stock_classes import check_class_extra
from stable_diffusion_server.pipelines.upscaling.upscaler_files import UPSCALER_TILES, UpscalerFiles
from stable_diffusion_server.pipelines.vision.picture_model_files import (
    PictureModelFile,
    PictureModelFiles,
    PictureModelRole,
)
from stable_diffusion_server.pipelines.vision.vision_messages import FoundBox
from stable_diffusion_server.pipelines.vision.vision_worker import PictureModels, VisionWorker

__all__ = [
    "CHUNK_TOKENS",
    "CLIP_G",
    "CLIP_L",
    "MODELS",
    "MOST_CHUNKS",
    "REAL_MODELS",
    "SAMPLING_NUMBERS",
    "SAMPLING_OPTIONS",
    "SCHEDULERS",
    "SCHEDULES",
    "TRUE_GUIDANCE",
    "UPSCALER_TILES",
    "ControlNetFacts",
    "ControlNetFolder",
    "Embedding",
    "EmbeddingFolder",
    "EmbeddingList",
    "ExtraParameter",
    "FileIdentity",
    "FoundBox",
    "HubClient",
    "HubListing",
    "ImagePromptFile",
    "ImagePromptFolder",
    "Kind",
    "LibraryModel",
    "LoraFolder",
    "ModelLibrary",
    "ModelSpec",
    "ModelTable",
    "OwnedModels",
    "OwnerSpec",
    "PictureModelFile",
    "PictureModelFiles",
    "PictureModelRole",
    "PictureModels",
    "UpscalerFiles",
    "VisionWorker",
    "WeightDigests",
    "WeightFileError",
    "check_class_extra",
    "check_pipeline_folder",
    "check_strength",
    "choose_models",
    "files_of_network",
    "files_of_repository",
    "find_owned_models",
    "folder_for",
    "header_size",
    "hub_headers",
    "hub_page",
    "hub_refusal",
    "identify",
    "identify_beginning",
    "identity_as_dict",
    "known_names",
    "list_repository",
    "pin_origin",
    "read_spec",
    "refusal_of_name",
    "resolve_sampling",
    "schedule_named",
    "scheduler_of",
    "spec_of",
    "spec_path",
    "why_refused",
    "with_lcm",
    "with_quantization",
    "without_identity",
]
