"""The models that look at pictures below MODELS_DIR: networks of control images, detectors and classifiers, by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.files import walk_files
from stable_diffusion_server.imaging import NeededFile
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.library.scan import ANNOTATOR_FOLDERS, CLASSIFIER_FOLDERS, DETECTOR_FOLDERS
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.model_spec import known_names

# Seconds within which the folders are not read again.
_FRESH = 2.0
# Endings that names may have; ADetailer names files of PyTorch, which here were exported.
_ENDINGS = (".onnx", ".pt", ".pth")
# Letters of a word that other words hold by chance, such as `hed` in sketched.
_SHORT = 3
# Of a folder of transformers, what decides its answers.
_FOLDER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


class PictureModelRole(StrEnum):
    """What a model finds in a picture."""

    ANNOTATOR = "annotator"
    DETECTOR = "detector"
    CLASSIFIER = "classifier"


# Folders in MODELS_DIR that hold nothing but these, in any case; AUTOMATIC1111's, Forge's and ADetailer's among them.
_FOLDERS = {
    PictureModelRole.ANNOTATOR: ANNOTATOR_FOLDERS,
    PictureModelRole.DETECTOR: DETECTOR_FOLDERS,
    PictureModelRole.CLASSIFIER: CLASSIFIER_FOLDERS,
}


@dataclass(frozen=True, slots=True)
class PictureModelFile:
    """A model by its name: its place below the folder of its role, without the ending; an ONNX file or a folder."""

    name: str
    path: Path


class PictureModelFiles:
    """The models of some folders. Thread-safe; its methods read files. `digests` is a file that keeps digests."""

    def __init__(self, folders: Sequence[Path], digests: Path | None = None) -> None:
        self._folders = folders
        self._digests = WeightDigests(digests)
        # Apart, since reading a large file takes seconds, and lists should not wait for it.
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        self._found: dict[PictureModelRole, tuple[PictureModelFile, ...]] = {}
        self._read_at = -_FRESH

    def files(self, role: PictureModelRole) -> tuple[PictureModelFile, ...]:
        """The models of a role, in the order of MODELS_DIR and of their names."""
        with self._lock:
            if time.monotonic() - self._read_at >= _FRESH:
                self._found = {part: tuple(self._read(part)) for part in PictureModelRole}
                self._read_at = time.monotonic()
            return self._found[role]

    def find(self, name: str, role: PictureModelRole, field: str) -> PictureModelFile:
        """The model of a name, in any case, also without its folders or with its ending.

        Raises `InvalidInput` for `field` if there is none.
        """
        files = self.files(role)
        asked = name.strip().lower()
        for ending in _ENDINGS:
            asked = asked.removesuffix(ending)
        for file in files:
            own = file.name.lower()
            if asked in (own, own.rpartition("/")[2]):
                return file
        there = known_names(name, [file.name for file in files])
        raise InvalidInput(f"{shown(name)!r} is not a {role} here; {there}.", field=field)

    def fitting(self, need: NeededFile) -> PictureModelFile | None:
        """The first network of control images whose name says that it is what a preprocessor needs."""
        for file in self.files(PictureModelRole.ANNOTATOR):
            if _says(file.name, need.words) and not _says(file.name, need.without):
                return file
        return None

    def digest(self, file: PictureModelFile) -> str:
        """The SHA-256 of a file, or of what decides the answers of a folder. Raises `ModelLoadError`."""
        with self._hashing:
            if not file.path.is_dir():
                return self._digests.of_file(file.path)
            parts = {name: file.path / name for name in _FOLDER_FILES}
            return self._digests.of({name: part for name, part in parts.items() if part.exists()})

    def _read(self, role: PictureModelRole) -> Iterator[PictureModelFile]:
        for folder in self._folders:
            try:
                places = sorted(place for place in folder.iterdir() if place.name.lower() in _FOLDERS[role])
            except OSError:
                continue
            for place in places:
                yield from _models_in(place)


def _says(name: str, words: Sequence[str]) -> bool:
    """Whether a name holds one of some words, without signs; short ones only as a word of the name's own."""
    letters, own = "".join(sign for sign in name.lower() if sign.isalnum()), _words_of(name)
    return any(word in (letters if len(word) > _SHORT else own) for word in words)


def _words_of(name: str) -> list[str]:
    """The words of a name in small letters: `ControlNetHED-v2` has control, net, hed, v and 2."""
    words = [""]
    for before, sign, after in zip(f" {name}", name, f"{name[1:]} ", strict=False):
        number = sign.isdigit() != before.isdigit()
        capital = sign.isupper() and (not before.isupper() or after.islower())
        if number or capital or not before.isalnum():
            words.append("")
        words[-1] += sign.lower() if sign.isalnum() else ""
    return words


def _models_in(folder: Path) -> Iterator[PictureModelFile]:
    """The ONNX files and the folders of transformers in a folder, by name."""
    found = {}
    for file in walk_files(folder, ".onnx", ".json"):
        if file.suffix == ".onnx":
            found[file.relative_to(folder).with_suffix("").as_posix()] = file
        elif file.name == "config.json" and (file.parent / "model.safetensors").exists() and file.parent != folder:
            found[file.parent.relative_to(folder).as_posix()] = file.parent
    for name in sorted(found):
        yield PictureModelFile(name, found[name])
