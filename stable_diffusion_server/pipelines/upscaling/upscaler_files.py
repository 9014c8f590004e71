"""The upscaler files below MODELS_DIR, and the embedded one: lists them and finds them by name. Imports no torch."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary
from stable_diffusion_server.pipelines.library.file_headers import read_safetensors, shown
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.library.names import ModelNames
from stable_diffusion_server.pipelines.loading.model_files import folder_in
from stable_diffusion_server.pipelines.loading.weight_digest import WeightDigests
from stable_diffusion_server.pipelines.model_spec import known_names

# Side and overlap of tiles, which results depend on by a 255th at most.
UPSCALER_TILES = "256.32"
EMBEDDED_FOLDER = "embedded-upscaler"
_ROLE = Kind.UPSCALER.value
# Folders of ComfyUI and AUTOMATIC1111 that hold nothing but upscalers.
_FOLDERS = ("upscale_models", "esrgan", "realesrgan")
# Seconds within which the folders are not read again.
_FRESH = 2.0
_USUAL_FACTOR = 4.0
_COMPACT_LAYER = re.compile(r"body\.(\d{1,4})\.weight")
# ESRGAN's own layers after the body: one for each doubling, then two more.
_OLD_LAYER = re.compile(r"model\.(?!0\.|1\.)\d{1,2}\.weight")


@dataclass(frozen=True, slots=True)
class UpscalerFile:
    """An upscaler that requests may name; `digest` is the SHA-256 of the file."""

    name: str
    path: Path
    digest: str


class UpscalerFiles:
    """The upscalers of some folders. Thread-safe; its methods read files.

    `cache` is a file that keeps what the headers said between processes, `digests` a file that keeps digests.
    """

    def __init__(self, folders: Sequence[Path], cache: Path | None = None, digests: Path | None = None) -> None:
        embedded = folder_in(folders[0], EMBEDDED_FOLDER) if folders else Path()
        places = [embedded, *folders]
        self._library = ModelLibrary([place for place in places if place.is_dir()], cache)
        self._digests = WeightDigests(digests)
        self._lock = threading.Lock()
        self._names = ModelNames(())
        self._factors: dict[str, float] = {}
        self._read_at = -_FRESH

    def factors(self) -> Mapping[str, float]:
        """The names of the upscalers that can be used, as their headers say, with the factor of each; sorted."""
        with self._lock:
            self._refresh()
            return dict(self._factors)

    def find(self, name: str, field: str) -> UpscalerFile:
        """The upscaler of a name, with or without the ending and the folders of its file.

        Raises `InvalidInput` for `field`: if there is none of this name, or with what is wrong with its file.
        """
        with self._lock:
            self._refresh()
            try:
                model = self._names.resolve(name, _ROLE, field)
            except InvalidInput as error:
                there = known_names(name, [*self._factors])
                raise InvalidInput(f"{shown(name)!r} is not an upscaler here; {there}.", field=field) from error
            if model.faults:
                raise InvalidInput(" ".join(model.faults), field=field)
            return UpscalerFile(model.name, model.path, self._digests.of_file(model.path))

    def _refresh(self) -> None:
        """Read the folders again, unless that was just done."""
        if time.monotonic() - self._read_at < _FRESH:
            return
        self._library.refresh()
        models = [replace(model, role=_ROLE) for model in self._library.models if _is_upscaler(model)]
        self._names = ModelNames(models)
        self._factors = {model.name: _factor_of(model.path) for model in models if not model.faults}
        self._read_at = time.monotonic()


def _is_upscaler(model: LibraryModel) -> bool:
    """Whether a file is an upscaler, or an unusable file in a folder of upscalers, whose reason is in the answer."""
    if model.role == _ROLE:
        return True
    return model.identity.kind is Kind.UNKNOWN and model.found.folder.lower() in _FOLDERS


def _factor_of(file: Path) -> float:
    """The factor by a file's header; the usual 4 for networks whose header does not show it."""
    try:
        shapes = read_safetensors(file).shapes
    except UnreadableModel:
        return _USUAL_FACTOR
    names = {name.removeprefix("params_ema.").removeprefix("params."): shape for name, shape in shapes.items()}
    layers = {int(match[1]): names[name] for name in names if (match := _COMPACT_LAYER.fullmatch(name))}
    if layers and len(names.get("body.1.weight", ())) == 1:
        return float(math.isqrt(layers[max(layers)][0] // 3))
    if "conv_up1.weight" in names and len(names.get("conv_first.weight", ())) == 4:
        cells = math.isqrt(names["conv_first.weight"][1] // 3)
        return (4.0 if "conv_up2.weight" in names else 2.0) / max(1, cells)
    ups = [name for name in names if _OLD_LAYER.fullmatch(name)]
    return float(2 ** (len(ups) - 2)) if len(ups) > 2 else _USUAL_FACTOR
