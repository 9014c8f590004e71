"""Finds the files of a model in MODELS_DIR, in the installed package or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from stable_diffusion_server.errors import ModelLoadError, ServerError
from stable_diffusion_server.pipelines.loading.hub import HubClient
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    INDEX,
    WeightFileError,
    files_of,
    files_of_part,
    index_of,
    parts_of,
    read_json,
)
from stable_diffusion_server.pipelines.model_spec import ModelSpec

_log = structlog.get_logger(__name__)

# An installed wheel holds the embedded models here (see pyproject.toml); in the source tree they are in models/.
PACKAGED = Path(__file__).resolve().parents[2] / "embedded"
_IN_TREE = PACKAGED.parents[1] / "models"
_EMBEDDED = "embedded-"
# The preferred variant of a ControlNet's weight files.
CONTROL_VARIANT = "fp16"


def folder_in(models_dir: Path, name: str) -> Path:
    """The folder of that name in `models_dir`; an embedded model that is not there comes from the package."""
    own = models_dir / name
    places = [PACKAGED / name, *([_IN_TREE / name] if name.startswith(_EMBEDDED) else [])]
    if own.is_dir() or own.is_symlink():  # a link that leads nowhere is reported, not replaced
        return own
    return next((place for place in places if place.is_dir()), own)


def model_folder(spec: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The folder of a model, downloaded if it is missing and there is a `hub`.

    Raises `ModelLoadError` when it is missing or holds a pipeline of another class.
    """
    folder = folder_in(models_dir, spec.folder)
    if folder.is_symlink() and not folder.exists():
        raise ModelLoadError(f"The model {spec.name} is missing: {spec.folder} is a link that leads nowhere.")
    if hub and spec.repo and not folder.is_dir():
        folder = hub.pipeline(spec.repo, spec.variant)
        _log.debug("read from the hub's cache", repo=spec.repo)
    index = index_of(folder)
    if not index.exists():
        raise ModelLoadError(f"The model {spec.name} is missing: no {INDEX} in {spec.folder}.")
    with translate_load_errors(spec.folder, folder):
        found = read_json(index).get("_class_name")
    if found != spec.pipeline_class:
        raise ModelLoadError(f"{spec.folder} holds a {found}, and {spec.name} needs a {spec.pipeline_class}.")
    return folder


def control_place(spec: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> Path | None:
    """The folder or file of a model's ControlNet; `None` if it has none. Raises `ModelLoadError`.

    A missing folder is downloaded likewise.
    """
    if spec.control_folder is None:
        return None
    folder = folder_in(models_dir, spec.control_folder)
    if folder.is_symlink() and not folder.exists():
        raise ModelLoadError(f"{spec.control_folder} is a link that leads nowhere.")
    if hub and spec.control_repo and not folder.is_dir():
        folder = hub.network(spec.control_repo, CONTROL_VARIANT)
        _log.debug("read from the hub's cache", repo=spec.control_repo)
    return folder if folder.exists() else None


def model_files(spec: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> dict[str, Path]:
    """The files that determine a model's images, by their paths in its folder. Raises `ModelLoadError`."""
    folder = model_folder(spec, models_dir, hub=hub)
    with translate_load_errors(spec.folder, folder):
        return files_of(folder, parts_of(folder), spec.variant)


def control_files(spec: ModelSpec, models_dir: Path, *, hub: HubClient | None = None) -> dict[str, Path]:
    """The files of a model's ControlNet by name; empty if it has none. Raises `ModelLoadError`."""
    folder = control_place(spec, models_dir, hub=hub)
    if folder is None or spec.control_folder is None:
        return {}
    if folder.is_file():
        return {folder.name: folder}
    with translate_load_errors(spec.control_folder, folder):
        return {file.name: file for file in files_of_part(folder, DIFFUSERS, CONTROL_VARIANT)}


def lcm_file(spec: ModelSpec, folder_name: str, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The LoRA file in a folder of MODELS_DIR, or of that name. Raises `ModelLoadError` when it is missing."""
    folder = folder_in(models_dir, folder_name)
    if folder.is_file():
        return folder
    if hub and spec.lcm_repo and not folder.is_dir():
        folder = hub.adapters(spec.lcm_repo)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"The LoRA of {spec.name} is missing: no .safetensors file in {folder_name}.")
    return files[0]


def lora_file(name: str, models_dir: Path, *, hub: HubClient | None = None) -> Path:
    """The file of CONTROLNET_LORA, which names a file or a folder (as a path or in MODELS_DIR) or a hub repository.

    Raises `ModelLoadError` unless there is exactly one.
    """
    path = next((path for path in (Path(name), models_dir / name) if path.exists()), None)
    if path is None and hub:
        path = hub.adapters(name)
    files = [] if path is None else [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelLoadError(f"CONTROLNET_LORA={name} names {len(files)} .safetensors files, and one is needed.")
    return files[0]


@contextmanager
def translate_load_errors(name: str, folder: Path) -> Iterator[None]:
    """Turn `WeightFileError` and the libraries' exceptions into a `ModelLoadError` of one sentence that says `name`."""
    try:
        yield
    except ServerError:
        raise
    except WeightFileError as error:
        raise ModelLoadError(f"The files in {name} cannot be loaded: {error}.") from error
    except Exception as error:  # the libraries have no class of their own for unreadable files
        _log.warning("model files cannot be loaded", folder=name, why=f"{type(error).__name__}: {error}")
        words = " ".join(str(error).split()).replace(str(folder), name).replace(str(Path.home()), "~").rstrip(".")
        raise ModelLoadError(
            f"The files in {name} cannot be loaded ({type(error).__name__}: {words[:300]})."
        ) from error
