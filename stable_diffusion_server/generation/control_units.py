"""Resolves control units: the network of each, its defaults, and what makes its control image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import changed_fields
from stable_diffusion_server.generation.preprocessing import ChosenPreprocessor, ImagePreprocessor
from stable_diffusion_server.imaging import NO_PREPROCESSOR, RESOLUTION, preprocessors_of
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import (
    ControlImage,
    ControlKind,
    ControlUnit,
    GenerationRequest,
    RequestWarning,
    Task,
    written,
)

# Kinds whose control image is the picture itself.
_READY = (ControlKind.INPAINT, ControlKind.SEGMENTATION, ControlKind.LOW_QUALITY)
# Networks that a sentence names at most.
_NAMED = 12


class ControlNetwork(Protocol):
    """Facts about a ControlNet: its name, the SHA-256 of its weights, and the kinds of control image it follows."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights; empty in a list."""

    @property
    def kinds(self) -> Sequence[ControlKind]:
        """The kinds that it follows; empty if its file does not say."""

    @property
    def union(self) -> bool:
        """Whether it is told the kind of each control image."""

    @property
    def default_weight(self) -> float:
        """Its usual weight."""


class ControlNetworks(Protocol):
    """The ControlNets of the server. Its methods read files, and block."""

    def usable(self, spec: ModelSpec, /) -> Mapping[str, ControlNetwork]:
        """Return those that guide a model, by name."""

    def find(self, name: str | None, kind: ControlKind | None, spec: ModelSpec, /) -> ControlNetwork:
        """Return the one of a name, or the first that follows a kind. Raises `InvalidInput`."""


class _NoNetworks:
    def usable(self, spec: ModelSpec, /) -> Mapping[str, ControlNetwork]:
        return {}

    def find(self, name: str | None, kind: ControlKind | None, spec: ModelSpec, /) -> ControlNetwork:
        raise InvalidInput(f"{spec.name} has no ControlNet here.")


NO_CONTROLNETS: ControlNetworks = _NoNetworks()


@dataclass(frozen=True, slots=True)
class ResolvedControl:
    """A unit with its network and all defaults."""

    unit: ControlUnit
    network: str
    revision: str
    kind: ControlKind
    weight: float
    preprocessor: ChosenPreprocessor

    @property
    def identity(self) -> dict[str, object]:
        """All that decides how it guides, except its images."""
        return {
            "network": self.revision,
            "kind": self.kind,
            "weight": self.weight,
            "steps": (self.unit.start, self.unit.end),
            "mode": self.unit.mode,
            "resize": self.unit.resize,
            "preprocess": self.preprocessor.identity,
            "own": (self.unit.image is not None, self.unit.mask is not None),
        }


def recorded_units(controls: Sequence[ResolvedControl]) -> list[dict[str, object]]:
    """Return the units as JSON types with all defaults, without their images: what a replay asks for."""
    return [
        {
            **changed_fields(control.unit),
            "kind": control.kind,
            "model": control.network,
            "weight": control.weight,
            "preprocess": control.preprocessor.name,
        }
        for control in controls
    ]


def shown_controls(controls: Sequence[ResolvedControl], drawn: Sequence[ControlImage]) -> list[dict[str, object]]:
    """Return what a record says of the control images that guided a picture."""
    return [
        {
            **{part.name: written(getattr(image, part.name)) for part in fields(image)},
            "preprocess": control.preprocessor.name,
            "options": dict(control.preprocessor.values),
            "resize": control.unit.resize,
        }
        for control, image in zip(controls, drawn, strict=True)
    ]


def resolve_controls(
    request: GenerationRequest, spec: ModelSpec, networks: ControlNetworks, preprocessors: ImagePreprocessor
) -> tuple[tuple[ResolvedControl, ...], list[RequestWarning]]:
    """Return the units of a request with all defaults, and warnings about unusual ones. Reads files; blocks.

    Raises `InvalidInput` that names every field at fault: an unknown network, what the model cannot follow, a unit
    without an image.
    """
    usable = networks.usable(spec)
    if not usable:
        sentence = f"{spec.name} has no ControlNet here, so nothing follows control images."
        raise InvalidInput(sentence, field="controls")
    resolved: list[ResolvedControl] = []
    warnings: list[RequestWarning] = []
    faults: list[tuple[str, str]] = []
    for number, unit in enumerate(request.controls):
        try:
            control = _resolved(unit, f"controls[{number}]", spec, networks, usable, preprocessors)
            _check_images(request, control, f"controls[{number}]")
        except InvalidInput as error:
            faults += error.faults
            continue
        resolved.append(control)
        warnings += _remarks(control, number, usable)
    if faults:
        raise InvalidInput.from_faults(faults)
    return tuple(resolved), warnings


def _resolved(
    unit: ControlUnit,
    field: str,
    spec: ModelSpec,
    networks: ControlNetworks,
    usable: Mapping[str, ControlNetwork],
    preprocessors: ImagePreprocessor,
) -> ResolvedControl:
    if unit.model is None and unit.kind is None:
        raise InvalidInput(f"{field} needs a kind or a model; {_offered(usable)}.", field=f"{field}.kind")
    named = f"{field}.{'kind' if unit.model is None else 'model'}"
    try:
        network = networks.find(unit.model, unit.kind, spec)
    except InvalidInput as error:
        raise InvalidInput(f"{named}: {error.detail}", field=named) from error
    kind = unit.kind or (network.kinds[0] if len(network.kinds) == 1 else None)
    if kind is None:
        known = ", ".join(network.kinds or ControlKind)
        raise InvalidInput(f"{field}.kind is needed: {network.name} follows {known}.", field=f"{field}.kind")
    if network.union and network.kinds and kind not in network.kinds:
        sentence = f"{field}.kind: {network.name} follows {', '.join(network.kinds)}, and not {kind}."
        raise InvalidInput(sentence, field=f"{field}.kind")
    weight = network.default_weight if unit.weight is None else unit.weight
    return ResolvedControl(
        unit, network.name, network.digest, kind, weight, _preprocessor(unit, kind, field, preprocessors)
    )


def _preprocessor(unit: ControlUnit, kind: ControlKind, field: str, found: ImagePreprocessor) -> ChosenPreprocessor:
    """Return what makes the control image: what the unit names, or the first usable one of its kind."""
    name = unit.preprocess
    if name is None:
        name = NO_PREPROCESSOR if kind in _READY else _first_of(kind, found, field)
    named = f"{field}.preprocess" if unit.preprocess is not None or not unit.options else f"{field}.options"
    options = {key: float(value) for key, value in unit.options}
    chosen = found.find(name, options, named)
    if unit.resolution is None or chosen.row is None or chosen.row.keeps_size:
        return chosen
    return found.find(name, {**options, RESOLUTION: float(unit.resolution)}, f"{field}.resolution")


def _first_of(kind: ControlKind, found: ImagePreprocessor, field: str) -> str:
    usable = {row.name for row in found.usable()}
    known = preprocessors_of(kind)
    name = next((row.name for row in known if row.name in usable and row.kind == kind), None)
    if name is None:
        needed = " or ".join(dict.fromkeys(need.what for row in known for need in row.needs))
        sentence = f"{field}.preprocess: {kind} images need {needed or 'a preprocessor'}, which this server does not "
        raise InvalidInput(f"{sentence}have; send one ready-made, with none.", field=f"{field}.preprocess")
    return name


def _check_images(request: GenerationRequest, control: ResolvedControl, field: str) -> None:
    """Raise `InvalidInput` if the unit has no picture, or has to be told what is repainted."""
    unit = control.unit
    if unit.image is None and request.image is None:
        raise InvalidInput(f"{field}.image is missing: the request has no input image.", field=f"{field}.image")
    if control.kind is ControlKind.INPAINT and unit.mask is None and request.task is not Task.INPAINT:
        raise InvalidInput(f"{field}.mask is missing: it says what is repainted.", field=f"{field}.mask")


def _remarks(control: ResolvedControl, number: int, usable: Mapping[str, ControlNetwork]) -> list[RequestWarning]:
    """Return warnings about a control image of another kind than the network or the preprocessor is made for."""
    kinds = usable[control.network].kinds if control.network in usable else ()
    row, sentences = control.preprocessor.row, []
    if kinds and control.kind not in kinds:
        sentences.append(f"{control.network} follows {', '.join(kinds)}, and gets {control.kind}.")
    if row is not None and control.kind not in row.kinds:
        sentences.append(f"{row.name} makes {row.kind} images, and the network gets them as {control.kind}.")
    return [RequestWarning("unusual-control", f"controls[{number}]: {sentence}") for sentence in sentences]


def _offered(usable: Mapping[str, ControlNetwork]) -> str:
    shown = [*usable.values()][:_NAMED]
    names = [f"{one.name} ({', '.join(one.kinds)})" if one.kinds else one.name for one in shown]
    more = f" and {len(usable) - _NAMED} more" if len(usable) > _NAMED else ""
    return f"there are {', '.join(names)}{more}"
