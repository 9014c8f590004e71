"""Loads networks that look at pictures from folders of transformers: safetensors and configurations, and no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.vision.onnx_file import RefusedFile

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_MOST_BYTES, _SENTENCE = 1_000_000, 200
# Files that name other files, and entries of the configuration that ask for other packages or weights.
_REFUSED_FILES = ("adapter_config.json", "model.safetensors.index.json")
_REFUSED_ENTRIES = ("auto_map", "quantization_config", "backbone", "use_pretrained_backbone", "use_timm_backbone")


def load_depth_folder(folder: Path) -> tuple[Any, Any]:
    """A network of depth and its processor. Raises `RefusedFile`."""
    check_folder(folder)
    from transformers import AutoModelForDepthEstimation

    return _loaded(AutoModelForDepthEstimation, folder)


def load_classifier_folder(folder: Path) -> tuple[Any, Any]:
    """A classifier of images and its processor. Raises `RefusedFile`."""
    check_folder(folder)
    from transformers import AutoModelForImageClassification

    return _loaded(AutoModelForImageClassification, folder)


def check_folder(folder: Path) -> None:
    """Raise `RefusedFile` unless a folder has one file of weights, and a configuration that needs nothing else."""
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise RefusedFile(f"It lacks {_CONFIG} or {_WEIGHTS}.")
    if found := [name for name in _REFUSED_FILES if (folder / name).exists()]:
        raise RefusedFile(f"It holds {found[0]}, which names other files.")
    try:
        with (folder / _CONFIG).open("rb") as file:
            config = json.loads(file.read(_MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise RefusedFile(f"Its {_CONFIG} is not JSON.") from error
    if not isinstance(config, dict) or any(config.get(entry) for entry in _REFUSED_ENTRIES):
        raise RefusedFile(f"Its {_CONFIG} asks for code or weights that are not in the folder.")


def _loaded(model_class: Any, folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    try:
        model = model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # anything is raised for a folder that does not fit
        raise RefusedFile(f"transformers cannot load it: {str(error)[:_SENTENCE]}") from error
    return model.eval(), processor
