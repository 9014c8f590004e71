"""The ControlNets below MODELS_DIR that control units may name: lists them and finds them. Imports no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from stable_diffusion_server.errors import InvalidInput, ModelLoadError
from stable_diffusion_server.pipelines.catalog import MODELS
from stable_diffusion_server.pipelines.conditioning.control_kinds import kinds_of
from stable_diffusion_server.pipelines.library import Kind, LibraryModel, ModelLibrary
from stable_diffusion_server.pipelines.library.file_headers import shown
from stable_diffusion_server.pipelines.library.names import ModelNames
from stable_diffusion_server.pipelines.model_spec import ModelSpec, known_names
from stable_diffusion_server.types import ControlKind

_ROLE = Kind.CONTROLNET.value
# Modules of the families that draw with ControlNets → the library's names of those.
_FAMILIES = {"sd15": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "z_image": "z-image"}
# Variants that are not read.
_UNREAD = {
    "t2i-adapter": "is a T2I adapter, which is not read",
    "lllite": "is a ControlLLLite, which is not read",
    "sai": "is a control LoRA, which is not read",
}
# Networks of the embedded models, which are too small for others.
_EMBEDDED = frozenset(spec.control_folder for spec in MODELS.values())
_SAFETENSORS = ".safetensors"
# Seconds within which the folders are not read again.
_FRESH = 2.0
_HASH = 8


@dataclass(frozen=True, slots=True)
class ControlNetFacts:
    """A ControlNet that units may name.

    Attributes:
        name: Its name, of the file or folder.
        digest: SHA-256 of its weights; empty in a list while they were not read.
        kinds: What it follows, the usual one first; none if its name does not tell.
        union: Whether it was trained for several kinds.
        default_weight: Weight of units without one.
        place: Its file or folder.
    """

    name: str
    digest: str
    kinds: tuple[ControlKind, ...]
    union: bool
    default_weight: float
    place: Path


class ControlNetDigests(Protocol):
    """SHA-256 digests of files, cached; see `WeightDigests`."""

    def of(self, files: Mapping[str, Path], /) -> str:
        """One digest of files by their names; reads those that are new or changed. Raises `ModelLoadError`."""

    def remembered(self, files: Mapping[str, Path], /) -> str | None:
        """The same digest if no file has to be read. Thread-safe."""


class ControlNetFolder:
    """The ControlNets of some folders. Thread-safe; its methods read files.

    `cache` is a file that keeps what the headers said between processes.
    """

    def __init__(self, folders: Sequence[Path], digests: ControlNetDigests, cache: Path | None = None) -> None:
        self._library = ModelLibrary([folder for folder in folders if folder.is_dir()], cache)
        self._digests = digests
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        self._models: tuple[LibraryModel, ...] = ()
        self._read_at = -_FRESH

    def usable(self, spec: ModelSpec) -> Mapping[str, ControlNetFacts]:
        """The ControlNets made for the model's family, by name, the model's own first. Reads no weights."""
        found = [model for model in self._read() if not _fault(model) and _fits(model, spec)]
        facts = (_facts(model, spec) for model in sorted(found, key=lambda model: not _is_own(model, spec)))
        return {one.name: replace(one, digest=self._remembered(one) or "") for one in facts}

    def find(self, name: str | None, kind: ControlKind | None, spec: ModelSpec) -> ControlNetFacts:
        """The ControlNet of a name, or the first one that follows `kind`; with its digest.

        A name may have the ending of its file, its folders before it, and AUTOMATIC1111's `[hash]` after it. Raises
        `InvalidInput`: if there is none, naming what there is, or with what is wrong with its file.
        """
        if name is None:
            return self._with_digest(self._first(kind, spec))
        models = [replace(model, role=_ROLE) for model in self._read() if _fits(model, spec) or _fault(model)]
        try:
            model = ModelNames(models).resolve(_without_hash(name), _ROLE, "model")
        except InvalidInput as error:
            there = known_names(name, [*self.usable(spec)])
            raise InvalidInput(f"{shown(name)!r} is not a ControlNet for {spec.name} here; {there}.") from error
        if fault := _fault(model):
            raise InvalidInput(fault)
        return self._with_digest(_facts(model, spec))

    def _first(self, kind: ControlKind | None, spec: ModelSpec) -> ControlNetFacts:
        usable = self.usable(spec)
        # The model's own comes first, then those that were trained for this kind alone.
        own = {model.name for model in self._read() if _is_own(model, spec)}
        ordered = sorted(usable.values(), key=lambda facts: (facts.name not in own, facts.union, len(facts.kinds)))
        for facts in ordered:
            if kind is not None and kind in facts.kinds:
                return facts
        there = f"there are {', '.join([*usable][:10])}" if usable else "there is none"
        wanted = f"that follows {kind.value}" if kind is not None else "without a name"
        raise InvalidInput(f"{spec.name} has no ControlNet {wanted} here; {there}.")

    def _with_digest(self, facts: ControlNetFacts) -> ControlNetFacts:
        """Reads the weights if they are new or changed; requests with others, which were read, do not wait."""
        try:
            digest = self._remembered(facts)
            if digest is None:
                with self._hashing:
                    digest = self._digests.of(weights_of(facts.place))
        except (ModelLoadError, OSError) as error:
            raise InvalidInput(f"{facts.name} cannot be read; it may have changed meanwhile.") from error
        return replace(facts, digest=digest)

    def _remembered(self, facts: ControlNetFacts) -> str | None:
        try:
            return self._digests.remembered(weights_of(facts.place))
        except OSError:
            return None

    def _read(self) -> tuple[LibraryModel, ...]:
        """The ControlNets; the folders are read again unless that was just done."""
        with self._lock:
            if time.monotonic() - self._read_at >= _FRESH:
                self._library.refresh()
                self._models = tuple(model for model in self._library.models if _is_controlnet(model))
                self._read_at = time.monotonic()
            return self._models


def weights_of(place: Path) -> dict[str, Path]:
    """The files that decide what a ControlNet computes, by name: its weights, and the configuration of a folder."""
    if place.is_file():
        return {place.name: place}
    files = sorted(file for file in place.iterdir() if file.suffix == _SAFETENSORS or file.name == "config.json")
    return {file.name: file for file in files}


def _is_controlnet(model: LibraryModel) -> bool:
    """Whether a file is a ControlNet, or an unusable file in a folder of ControlNets, whose reason is in the answer."""
    if model.identity.kind in (Kind.CONTROLNET, Kind.CONTROL_LORA):
        return True
    return model.identity.kind is Kind.UNKNOWN and model.found.folder.lower() in ("controlnet", "t2i_adapter")


def _fault(model: LibraryModel) -> str:
    """Why a file cannot be used, as a sentence; empty if it can."""
    if model.faults:
        return " ".join(model.faults)
    name, unread = shown(model.file_name, 200), _UNREAD.get(model.identity.variant)
    return f"{name} {unread}." if unread else ""


def _fits(model: LibraryModel, spec: ModelSpec) -> bool:
    if _is_own(model, spec):  # the embedded one has widths of no known family
        return True
    return model.path.name not in _EMBEDDED and _family(spec) in model.identity.families


def _is_own(model: LibraryModel, spec: ModelSpec) -> bool:
    """Whether it is the one that a model's edges are followed by."""
    own = Path(spec.control_folder).parts if spec.control_folder else ()
    return bool(own) and model.path.parts[-len(own) :] == own


def _family(spec: ModelSpec) -> str:
    """The library's name of a model's family; empty for one that draws without ControlNets."""
    return _FAMILIES.get(spec.family.partition(":")[0].rpartition(".")[2], "")


def _facts(model: LibraryModel, spec: ModelSpec) -> ControlNetFacts:
    identity = model.identity
    family = _family(spec)
    union = identity.variant == "union" or family == "z-image"
    kinds = kinds_of(model.name, family, identity.variant)
    weight = spec.control_scale if _is_own(model, spec) else 1.0
    return ControlNetFacts(model.name, "", kinds, union, weight, model.path)


def _without_hash(name: str) -> str:
    """A name without AUTOMATIC1111's short hash: `depth [a1b2c3d4]`."""
    base, bracket, digits = name.strip().rpartition(" [")
    is_hash = bracket and digits.endswith("]") and 0 < len(digits) - 1 <= 2 * _HASH
    return base if is_hash else name
