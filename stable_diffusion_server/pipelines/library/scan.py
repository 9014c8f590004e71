"""Finds model files and folders below MODELS_DIR, in the folder layouts of ComfyUI, AUTOMATIC1111 and the hub."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from stable_diffusion_server.pipelines.library.file_headers import is_folder
from stable_diffusion_server.pipelines.library.folder_rules import CONFIG, INDEX, MODULAR
from stable_diffusion_server.pipelines.library.identification import SUFFIXES
from stable_diffusion_server.pipelines.library.shards import index_ending, indexes_of_shard

MAX_DEPTH, MAX_ENTRIES, MAX_MODELS = 8, 200_000, 20_000
# Folder names of ComfyUI and AUTOMATIC1111, in small letters.
ROLE_FOLDERS = frozenset(
    "checkpoints stable-diffusion diffusion_models unet text_encoders clip vae vae_approx vae-approx loras lora "
    "lycoris embeddings controlnet upscale_models esrgan realesrgan clip_vision ipadapter style_models".split()
)
# Folders in MODELS_DIR, in small letters, of models that look at pictures, which draw nothing and have a list of their
# own: of control images, detectors, classifiers.
ANNOTATOR_FOLDERS = ("annotators", "controlnet_annotators", "controlnetpreprocessor")
DETECTOR_FOLDERS = ("detectors", "ultralytics", "adetailer")
CLASSIFIER_FOLDERS = ("classifiers",)
_LOOKING = frozenset((*ANNOTATOR_FOLDERS, *DETECTOR_FOLDERS, *CLASSIFIER_FOLDERS))
_HUB = "models--"
# Beginnings of the names of weight files that belong to the config.json beside them.
_OWN_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A file or folder that may be a model.

    Attributes:
        path: Its path; links in it are not resolved.
        root: Number of its folder in MODELS_DIR.
        folder: The folder of ComfyUI or AUTOMATIC1111 that holds it, as written; empty if there is none.
        name: Its path below that folder, with slashes and without the ending.
        ending: `.safetensors` …, `.safetensors.index.json` for a model in several files; empty for a folder.
    """

    path: Path
    root: int
    folder: str
    name: str
    ending: str


@dataclass(slots=True)
class ScanResult:
    """What a scan found, and what it did not look at, as sentences."""

    found: list[FoundModel] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Place:
    path: Path
    depth: int
    parts: tuple[str, ...]  # below MODELS_DIR; a hub folder counts as `owner`, `name`


def scan_folders(folders: Sequence[Path], skip: Collection[str] = ()) -> ScanResult:
    """Find the models in folders, breadth first, without reading them; `skip` names folders to leave out.

    Follows links, also out of the folder, and enters each folder once, so circular links are safe.
    """
    result = ScanResult()
    entered: set[tuple[int, int]] = set()
    left = MAX_ENTRIES
    for number, folder in enumerate(folders):
        places = deque([_Place(folder, 0, ())])
        while places:
            place = places.popleft()
            entries = _entries(place, entered, result)
            left -= len(entries)
            if left < 0 or len(result.found) >= MAX_MODELS:
                result.remarks.append(f"More than {MAX_ENTRIES:,} files are in MODELS_DIR; the rest is not looked at.")
                return result
            places.extend(_visit(place, entries, number, result, skip))
    return result


def _entries(place: _Place, entered: set[tuple[int, int]], result: ScanResult) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; none if it was entered before or cannot be read."""
    try:
        facts = place.path.stat()
        if (facts.st_dev, facts.st_ino) in entered:
            return []
        entered.add((facts.st_dev, facts.st_ino))
        with os.scandir(place.path) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        shown = "/".join(place.parts) or place.path.name
        result.remarks.append(f"The folder {ascii(shown)[1:-1]} cannot be read ({error.strerror}).")
        return []


def _visit(
    place: _Place, entries: list[os.DirEntry[str]], root: int, result: ScanResult, skip: Collection[str]
) -> list[_Place]:
    """Add what a folder holds to the result; returns the folders in it to visit."""
    names = {entry.name for entry in entries}
    is_pipeline = INDEX in names or MODULAR in names
    has_weights = any(name.startswith(_OWN_WEIGHTS) and name.endswith((".safetensors", ".bin")) for name in names)
    is_network = CONFIG in names and has_weights and not is_pipeline
    if place.depth and (is_pipeline or is_network):
        result.found.append(_found(place.path, root, place.parts, ""))
    inner = []
    for entry in entries:
        ending = next((suffix for suffix in SUFFIXES if entry.name.lower().endswith(suffix)), "")
        ending = ending or index_ending(entry.name)
        if names.intersection(indexes_of_shard(entry.name)):
            continue  # the index stands for its shards
        if _is_folder(entry):
            known = place.depth and is_pipeline  # its folders are its parts
            known = known or (not place.depth and entry.name.lower() in _LOOKING)
            if not known and place.depth < MAX_DEPTH and entry.name not in skip:
                inner.append(_inner(place, entry.name))
        elif ending and not (is_network and entry.name.startswith(_OWN_WEIGHTS)):
            result.found.append(_found(Path(entry.path), root, (*place.parts, entry.name), ending))
    return inner


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _inner(place: _Place, name: str) -> _Place:
    """A folder to visit; of a repository in the hub's cache its current snapshot."""
    path = place.path / name
    if name.startswith(_HUB) and is_folder(path / "snapshots"):
        repository = tuple(part for part in name.removeprefix(_HUB).split("--") if part)
        return _Place(_snapshot(path), place.depth + 1, (*place.parts, *repository))
    return _Place(path, place.depth + 1, (*place.parts, name))


def _snapshot(repository: Path) -> Path:
    """The snapshot of the branch `main`, or else the newest one."""
    snapshots = repository / "snapshots"
    try:
        with (repository / "refs" / "main").open("rb") as file:
            commit = file.read(100).decode("ascii", "replace").strip()
        if commit.isalnum() and (snapshots / commit).is_dir():
            return snapshots / commit
    except OSError:
        pass
    try:
        return max((path for path in snapshots.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    except (OSError, ValueError):
        return snapshots


def _found(path: Path, root: int, parts: tuple[str, ...], ending: str) -> FoundModel:
    """Name a model by its path below the first folder that has a known role."""
    inner = parts[:-1]
    at = next((index for index, part in enumerate(inner) if part.lower() in ROLE_FOLDERS), None)
    folder = "" if at is None else inner[at]
    named = parts if at is None else parts[at + 1 :]
    name = str(PurePosixPath(*named))
    return FoundModel(path, root, folder, name[: len(name) - len(ending)], ending)
