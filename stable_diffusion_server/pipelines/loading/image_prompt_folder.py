"""The files below MODELS_DIR that read image prompts, with their encoders: lists and finds them. Imports no torch."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary
from stable_diffusion_server.pipelines.library.file_headers import TensorHeader, read_safetensors, shown
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.library.names import ModelNames
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.model_spec import ModelSpec, known_names

_ROLE = Kind.IMAGE_PROMPT.value
# Modules of the families that draw by image prompts → the library's names of those.
_FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "flux": "flux"}
# Folders that hold nothing else, and beginnings of file names that say the same.
_FOLDERS = ("ipadapter", "style_models")
_NAMED = ("ip-adapter", "ip_adapter", "ipadapter")
_REDUX = "redux"
# Folders of FLUX.1 Redux that decide what it gives.
_REDUX_PARTS = ("image_encoder", "image_embedder", "feature_extractor")
# Seconds within which the folders are not read again.
_FRESH = 2.0
# Adapters that stay loaded at a time.
KEPT_ADAPTERS = 2


@dataclass(frozen=True, slots=True)
class ImagePromptFile:
    """What reads image prompts: an IP-Adapter and the encoder that it was trained with, or FLUX.1 Redux with its own.

    Attributes:
        name: Its name.
        path: Its file, or the folder of Redux.
        encoder: The file or folder of its encoder, that of Redux again.
        adapter_digest: SHA-256 of its file; empty until it is asked for by `find`.
        encoder_digest: SHA-256 of the encoder, likewise.
    """

    name: str
    path: Path
    encoder: Path
    adapter_digest: str = ""
    encoder_digest: str = ""

    @property
    def takes_range(self) -> bool:
        """Whether it may count for a part of the steps: Redux makes the prompt longer, at all of them."""
        return self.path != self.encoder

    @property
    def digest(self) -> str:
        """SHA-256 of both, in 64 hexadecimal digits."""
        return hashlib.sha256(f"{self.adapter_digest}\n{self.encoder_digest}\n".encode()).hexdigest()


class ImagePromptFolder:
    """The image prompt files of some folders. Thread-safe; its methods read files.

    `cache` is a file that keeps what the headers said between processes, `digests` one that keeps digests.
    """

    def __init__(self, folders: Sequence[Path] = (), cache: Path | None = None, digests: Path | None = None) -> None:
        self._library = ModelLibrary([folder for folder in folders if folder.is_dir()], cache)
        self._digests = WeightDigests(digests)
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        self._adapters: tuple[LibraryModel, ...] = ()
        self._encoders: tuple[tuple[Path, TensorHeader], ...] = ()
        self._read_at = -_FRESH
        self.is_offered = bool(folders)

    def usable(self, spec: ModelSpec) -> tuple[str, ...]:
        """The names of the adapters for a model whose encoders are here, in the order in which they are taken."""
        return tuple(model.name for model in self._fitting(spec) if not self._fault(model))

    def find(self, name: str | None, spec: ModelSpec) -> ImagePromptFile:
        """The adapter of a name, with or without the ending and folders of its file; or the first one for a model.

        Raises `InvalidInput`: if there is none, naming what there is, or with what is wrong with its file.
        """
        usable = self.usable(spec)
        if name is None and not usable:
            raise InvalidInput(f"{spec.name} has nothing here that reads image prompts.")
        models = [replace(model, role=_ROLE) for model in self._fitting(spec)]
        try:
            model = ModelNames(models).resolve(name or usable[0], _ROLE, "model")
        except InvalidInput as error:
            there = known_names(name or "", usable) if usable else "there is none"
            raise InvalidInput(
                f"{shown(name or '')!r} reads no image prompts for {spec.name} here; {there}."
            ) from error
        if fault := self._fault(model):
            raise InvalidInput(fault)
        encoder = model.path if model.identity.variant == _REDUX else self._encoder_for(model.path)
        if encoder is None:
            raise InvalidInput(f"{model.name} was removed meanwhile.")
        return self._with_digest(ImagePromptFile(model.name, model.path, encoder))

    def largest_bytes(self, spec: ModelSpec) -> int:
        """Bytes of the adapters that stay loaded with a model at most; encoders and Redux do not stay."""
        names = set(self.usable(spec)) if self.is_offered else set()
        sizes = sorted(model.size for model in self._adapters if model.name in names and model.found.ending)
        return sum(sizes[-KEPT_ADAPTERS:])

    def _with_digest(self, file: ImagePromptFile) -> ImagePromptFile:
        """Reads the weights if they changed since."""
        try:
            with self._hashing:
                encoder = self._digests.of(_files_of(file.encoder))
                adapter = self._digests.of_file(file.path) if file.takes_range else encoder
        except (ModelLoadError, OSError) as error:
            raise InvalidInput(f"{file.name} or its encoder cannot be read; it may have changed meanwhile.") from error
        return replace(file, adapter_digest=adapter, encoder_digest=encoder)

    def _fitting(self, spec: ModelSpec) -> list[LibraryModel]:
        """The adapters for a model's family, and files that cannot be used, whose reason is in the answer."""
        family = _FAMILIES.get(spec.family.partition(":")[0].rpartition(".")[2])
        adapters = self._read()
        if family is None:
            return []
        return [model for model in adapters if not model.identity.families or family in model.identity.families]

    def _fault(self, model: LibraryModel) -> str:
        """Why a file cannot be used, as a sentence; empty if it can."""
        name = shown(model.file_name, 200)
        if model.faults:
            return " ".join(model.faults)
        if model.identity.variant == _REDUX and model.identity.container == "folder":
            return ""
        if model.identity.variant == "ip-adapter-faceid":
            return f"{name} reads faces that InsightFace found, which is not here; take one of the Plus-Face adapters."
        if not model.identity.variant.startswith("ip-adapter") or model.identity.layout != "original":
            return (
                f"{name} is no IP-Adapter for Stable Diffusion and no folder of FLUX.1 Redux, and only those are read."
            )
        if self._encoder_for(model.path) is None:
            return f"{name} needs an image encoder {_needs(model.path)}, and there is none in MODELS_DIR."
        return ""

    def _encoder_for(self, file: Path) -> Path | None:
        """The first encoder with the features that an adapter reads."""
        tensor, width = _features(file)
        return next((place for place, header in self._encoders if width and header.side(tensor, 0) == width), None)

    def _read(self) -> tuple[LibraryModel, ...]:
        """The adapters; the folders are read again unless that was just done."""
        with self._lock:
            if self.is_offered and time.monotonic() - self._read_at >= _FRESH:
                self._library.refresh()
                models = self._library.models
                self._adapters = tuple(model for model in models if _is_adapter(model))
                encoders = [model.path for model in models if _is_encoder(model)]
                self._encoders = tuple((place, _header(place)) for place in encoders)
                self._read_at = time.monotonic()
            return self._adapters


def _is_adapter(model: LibraryModel) -> bool:
    if model.identity.kind is not Kind.UNKNOWN:
        return model.identity.kind is Kind.IMAGE_PROMPT
    file = model.found.name.rpartition("/")[2].lower()
    return model.found.folder.lower() in _FOLDERS or file.startswith(_NAMED)


def _is_encoder(model: LibraryModel) -> bool:
    return model.identity.kind is Kind.IMAGE_ENCODER and model.identity.variant == "clip-vision" and not model.faults


def _header(place: Path) -> TensorHeader:
    """The header of a file, or of the first weight file in a folder; without tensors if it cannot be read."""
    try:
        files = [file for name, file in _files_of(place).items() if name.endswith(".safetensors")]
        return read_safetensors(files[0])
    except (UnreadableModel, IndexError, OSError):
        return TensorHeader({}, {})


def _features(file: Path) -> tuple[str, int]:
    """What an adapter reads: the tensor of an encoder whose first side is the width of its features, and that width."""
    header = _header(file)
    if "image_proj.proj.weight" in header:
        return "visual_projection.weight", header.side("image_proj.proj.weight", 1)
    name = "image_proj.proj_in.weight" if "image_proj.latents" in header else "image_proj.proj.0.weight"
    return "vision_model.embeddings.class_embedding", header.side(name, 1)


def _needs(file: Path) -> str:
    """Words for the encoder that an adapter reads."""
    tensor, width = _features(file)
    return f"whose {'embeddings are' if tensor.startswith('visual') else 'layers are'} {width} wide"


def _files_of(place: Path) -> dict[str, Path]:
    """The files that decide what an encoder, or a folder of Redux, gives, by name."""
    if not place.is_dir():
        return {place.name: place}
    parts = [place / name for name in _REDUX_PARTS if (place / name).is_dir()] or [place]
    named = ((f"{part.name}/" if part != place else "", file) for part in parts for file in sorted(part.iterdir()))
    return {f"{start}{file.name}": file for start, file in named if file.suffix in (".safetensors", ".json")}
