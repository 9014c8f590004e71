"""Chooses the models to load by the settings and by the files in MODELS_DIR."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines import (
    MODELS,
    REAL_MODELS,
    ControlNetFolder,
    EmbeddingFolder,
    ImagePromptFolder,
    LoraFolder,
    ModelSpec,
    ModelTable,
    OwnedModels,
    WeightDigests,
    choose_models,
    find_owned_models,
)
from stable_diffusion_server.settings import Settings, SettingsError

# Files whose reasons are in the sentence that no model can be used.
_SHOWN = 12
# Files of a model folder that a stamp is made of.
_MAX_FILES = 1000


class ModelChoice(NamedTuple):
    """The models to load, why other files in MODELS_DIR are not used, by name, and remarks on those that are."""

    models: ModelTable[ModelSpec]
    refused: Mapping[str, str]
    remarks: tuple[str, ...] = ()


def choose_from_folder(settings: Settings) -> ModelChoice:
    """Return the models to load.

    Raises `ModelLoadError` if there is nothing to load: embedded models never stand in for the operator's files.
    """
    folders = {facts.folder for candidates in REAL_MODELS.values() for facts in candidates}
    models_dir = folder_with_models(settings)
    places = {folder: models_dir / folder for folder in folders}
    # A broken link counts as present, so that loading reports it instead of silently using another model.
    present = [folder for folder, place in places.items() if place.is_dir() or place.is_symlink()]
    wanted = settings.hub_models or (settings.text_to_image_model,)
    if settings.models == "embedded":
        return ModelChoice(ModelTable(MODELS, {facts.folder: name for name, facts in MODELS.items()}), {})
    known = {next((facts.folder for facts in rows if facts.folder in present), "") for rows in REAL_MODELS.values()}
    owned = find_owned_models(models_dir, settings.models_dir, settings.data_dir / "model-files.json", known)
    found: dict[str, ModelSpec] = {}
    if settings.models == "local" and owned and not any(known):
        pass  # a sentence that names the folders of the catalogue would hide the reasons of the files
    else:
        found = dict(choose_models(settings.models, present, wanted))
    if settings.models == "auto" and (owned or present):
        found = {name: facts for name, facts in found.items() if facts.folder in present}
    if owned and not found and not owned.specs:
        reasons = [*owned.refused.values()]
        more = f" `models list` shows {len(reasons) - _SHOWN} more." if len(reasons) > _SHOWN else ""
        raise ModelLoadError(f"No model in MODELS_DIR can be used. {' '.join(reasons[:_SHOWN])}{more}")
    if settings.models == "auto" and (owned or present):
        embedded = {facts.folder: replace(facts, name=facts.folder) for facts in MODELS.values()}
        found = {**found, **owned.specs, **embedded}
    else:
        found = {**found, **owned.specs}
    aliases = {facts.folder: name for name, facts in found.items() if name in REAL_MODELS}
    table = ModelTable(found, {**owned.aliases, **aliases, **_family_aliases(settings, found, owned)})
    return ModelChoice(table, owned.refused, tuple(owned.remarks))


def folder_with_models(settings: Settings) -> Path:
    """Return the folder of MODELS_DIR that models are loaded from: the first that holds one of the catalogue's."""
    names = [facts.folder for candidates in REAL_MODELS.values() for facts in candidates]
    folders = settings.models_dir
    return next((folder for folder in folders if any((folder / name).exists() for name in names)), folders[0])


def file_stamp(settings: Settings, spec: ModelSpec) -> tuple[object, ...]:
    """Return what changes when the files of a model are replaced: their places, sizes and times."""
    folder = folder_with_models(settings)
    files = spec.checkpoint
    names = [spec.folder] if files is None else [name for _, name in files.parts]
    names += [files.tokenizer] if files is not None and files.tokenizer else []
    names += [spec.control_folder] if spec.control_folder else []
    names += [name for name, _ in spec.builtin_loras]
    stamps = []
    for file in (file for name in names for file in _files_in(folder / name)):
        with suppress(OSError):
            facts = file.stat()
            times = facts.st_mtime_ns, facts.st_ctime_ns
            stamps.append((str(file), facts.st_dev, facts.st_ino, facts.st_size, *times))
    return tuple(stamps)


def _files_in(place: Path) -> list[Path]:
    """Return the files in a folder and its folders; of an index of shards also the weights beside it."""
    if place.is_dir():
        return sorted(file for file in (*place.glob("*"), *place.glob("*/*")) if not file.is_dir())[:_MAX_FILES]
    return [place, *sorted(place.parent.glob("*.safetensors"))] if place.suffix == ".json" else [place]


def _family_aliases(settings: Settings, found: Mapping[str, ModelSpec], owned: OwnedModels) -> dict[str, str]:
    """Return the default model of each family that has no model of the family's name: TEXT_TO_IMAGE_MODEL, or first."""
    aliases = {}
    for family in REAL_MODELS:
        names = owned.of_family(family)
        if family not in found and names:
            aliases[family] = settings.text_to_image_model if settings.text_to_image_model in names else names[0]
    return aliases


def check_model_names(settings: Settings, names: Collection[str]) -> None:
    """Raise `SettingsError` if TEXT_TO_IMAGE_MODEL, MODEL_SHARES or MODEL_ALIASES names a model not among `names`.

    The names of the families are allowed, also where no model of the family is there.
    """
    shown = ", ".join(known := sorted({*MODELS, *REAL_MODELS, *names}))
    if settings.text_to_image_model not in known:
        raise SettingsError(f"TEXT_TO_IMAGE_MODEL {settings.text_to_image_model!r} is not one of {shown}.")
    if unknown := [name for name in settings.shares() if name not in known]:
        raise SettingsError(f"MODEL_SHARES names {unknown[0][:100]!r}, which is not one of {shown}.")
    for alias in settings.model_aliases:
        if "=" in alias and alias.partition("=")[2] not in known:
            raise SettingsError(f"MODEL_ALIASES {alias!r} names a model other than {shown}.")


def folders_of(settings: Settings) -> dict[str, Any]:
    """Return what requests may name beside models, as `ModelState` takes it. Reads no file yet."""
    kept = (settings.data_dir / f"image-prompt-{name}.json" for name in ("files", "digests"))
    digests = WeightDigests(settings.data_dir / "controlnets.json")
    return {
        "loras": LoraFolder(settings.lora_dir, settings.max_lora_bytes),
        "embeddings": EmbeddingFolder(settings.embeddings_dir),
        "image_prompts": ImagePromptFolder(settings.models_dir, *kept),
        "controlnets": ControlNetFolder(settings.models_dir, digests, settings.data_dir / "control-files.json"),
    }
