"""Models on disk: identifies files by their headers, finds them in MODELS_DIR, names them. Imports no torch."""

from __future__ import annotations

from stable_diffusion_server.pipelines.library.identification import identify
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
    "identify",
    "identity_as_dict",
    "read_spec",
    "spec_path",
]
