"""The use case: request, image, stored result; and replay, library and provenance."""

from __future__ import annotations

from stable_diffusion_server.generation.executor import SubmissionContext
from stable_diffusion_server.generation.interfaces import DecodeImage
from stable_diffusion_server.generation.library import ImageLibrary
from stable_diffusion_server.generation.limits import NAME_MAX, TEXT_MAX, RequestLimits, whole_number
from stable_diffusion_server.generation.ownership import Ownership
from stable_diffusion_server.generation.replay import PICTURE, EmbeddedProvenance, ReplayService, with_sources
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.generation.service import GenerationService

__all__ = [
    "NAME_MAX",
    "PICTURE",
    "TEXT_MAX",
    "DecodeImage",
    "EmbeddedProvenance",
    "GenerationOptions",
    "GenerationService",
    "ImageLibrary",
    "Ownership",
    "ReplayService",
    "RequestLimits",
    "SubmissionContext",
    "whole_number",
    "with_sources",
]
