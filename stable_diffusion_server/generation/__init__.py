"""The generation use case: request → image → stored result; also replay, image library and provenance metadata."""

from __future__ import annotations

from stable_diffusion_server.generation.control_units import NO_CONTROLNETS, ControlNetwork, ControlNetworks
from stable_diffusion_server.generation.executor import SubmissionContext
from stable_diffusion_server.generation.expansion import STYLES_MAX, PromptExpander, image_seed
from stable_diffusion_server.generation.hires_choices import latent_resize
from stable_diffusion_server.generation.image_prompts import ImagePromptAdapters
from stable_diffusion_server.generation.interfaces import NO_UPSCALER, ChosenUpscaler, DecodeImage, ImageUpscaler
from stable_diffusion_server.generation.library import ImageLibrary
from stable_diffusion_server.generation.limits import (
    NAME_MAX,
    TEXT_MAX,
    RequestLimits,
    extension_fields,
    extension_of,
    parse_int,
    range_sentence,
)
from stable_diffusion_server.generation.permissions import Ownership, able, not_permitted, permitted_models
from stable_diffusion_server.generation.preprocessing import (
    ChosenPreprocessor,
    ImagePreprocessor,
    InProcessPreprocessor,
)
from stable_diffusion_server.generation.prompt_files import PromptFiles
from stable_diffusion_server.generation.prompts import load_stop_words
from stable_diffusion_server.generation.quality import DecodedPixels
from stable_diffusion_server.generation.repair_requests import (
    MOST_PART_PROMPTS,
    MOST_REPAIRS,
    REPAIR_BOUNDS,
    ChosenDetector,
    DetailDetector,
    DetectedPart,
    NoDetector,
)
from stable_diffusion_server.generation.replay import IMAGE_FIELD, EmbeddedProvenance, ReplayService, with_sources
from stable_diffusion_server.generation.resolved_output import DEFAULT_QUALITY
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.service import GenerationService
from stable_diffusion_server.generation.tiling import check_tiling
from stable_diffusion_server.generation.upscaling import DEFAULT_UPSCALER, UpscaleStopped
from stable_diffusion_server.generation.verification import Verdict, Verification, VerificationService

__all__ = [
    "DEFAULT_QUALITY",
    "DEFAULT_UPSCALER",
    "IMAGE_FIELD",
    "MOST_PART_PROMPTS",
    "MOST_REPAIRS",
    "NAME_MAX",
    "NO_CONTROLNETS",
    "NO_UPSCALER",
    "REPAIR_BOUNDS",
    "STYLES_MAX",
    "TEXT_MAX",
    "ChosenDetector",
    "ChosenPreprocessor",
    "ChosenUpscaler",
    "ControlNetwork",
    "ControlNetworks",
    "DecodeImage",
    "DecodedPixels",
    "DetailDetector",
    "DetectedPart",
    "EmbeddedProvenance",
    "GenerationOptions",
    "GenerationService",
    "ImageLibrary",
    "ImagePreprocessor",
    "ImagePromptAdapters",
    "ImageUpscaler",
    "InProcessPreprocessor",
    "NoDetector",
    "Ownership",
    "PromptExpander",
    "PromptFiles",
    "ReplayService",
    "RequestLimits",
    "SubmissionContext",
    "UpscaleStopped",
    "Verdict",
    "Verification",
    "VerificationService",
    "able",
    "check_tiling",
    "extension_fields",
    "extension_of",
    "image_seed",
    "latent_resize",
    "load_stop_words",
    "not_permitted",
    "parse_int",
    "permitted_models",
    "range_sentence",
    "with_sources",
]
