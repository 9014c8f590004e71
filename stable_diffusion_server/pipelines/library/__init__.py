"""Models on disk: identifies files by their headers, finds them in MODELS_DIR, names them. Imports no torch."""

from __future__ import annotations

from stable_diffusion_server.pipelines.library.fetched_models import (
    folder_for,
    header_size,
    identify_beginning,
    pin_origin,
)
from stable_diffusion_server.pipelines.library.identification import identify, refusal_of_name
from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind, ModelTask
from stable_diffusion_server.pipelines.library.identity_cache import identity_as_dict
from stable_diffusion_server.pipelines.library.model_library import ModelLibrary
from stable_diffusion_server.pipelines.library.names import LibraryModel
from stable_diffusion_server.pipelines.library.spec_file import OwnerSpec, read_spec, spec_path

__all__ = [
    "FileIdentity",
    "Kind",
    "LibraryModel",
    "ModelLibrary",
    "ModelTask",
    "OwnerSpec",
    "folder_for",
    "header_size",
    "identify",
    "identify_beginning",
    "identity_as_dict",
    "pin_origin",
    "read_spec",
    "refusal_of_name",
    "spec_path",
]
