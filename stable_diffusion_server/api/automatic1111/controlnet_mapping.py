"""Maps the units of AUTOMATIC1111's ControlNet extension to control units of this server.

One plain unit of edges is what `canny` asks for, as before there were control units, so that it keeps its key. What
cannot be followed is left out with a sentence, as in the rest of this dialect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stable_diffusion_server.api.automatic1111.controlnet_names import (
    base_name,
    is_inpainting,
    numbers_of,
    resolution_of,
    row_of,
)
from stable_diffusion_server.api.automatic1111.controlnet_units import SentUnit
from stable_diffusion_server.api.automatic1111.task_params import Img2Img, Txt2Img
from stable_diffusion_server.api.base64_images import bytes_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import ControlNetwork
from stable_diffusion_server.imaging import NO_PREPROCESSOR, Preprocessor
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import ControlKind, ControlMode, ControlUnit, ImageInput

FIELD = "alwayson_scripts"
_CANNY, _CANNY_LOW, _CANNY_HIGH = "canny", 100, 200
# Words in the name of a network that tell its kind.
_WORDS: Mapping[str, ControlKind] = {
    "lineart": ControlKind.LINEART,
    "softedge": ControlKind.SOFTEDGE,
    "hed": ControlKind.SOFTEDGE,
    "scribble": ControlKind.SCRIBBLE,
    "depth": ControlKind.DEPTH,
    "normal": ControlKind.NORMAL,
    "openpose": ControlKind.OPENPOSE,
    "seg": ControlKind.SEGMENTATION,
    "tile": ControlKind.TILE,
    "inpaint": ControlKind.INPAINT,
    "blur": ControlKind.BLUR,
    "canny": ControlKind.CANNY,
}
# Kinds by the extension's names of the tasks of a Union network.
_UNION_TYPES: Mapping[str, ControlKind] = {
    "openpose": ControlKind.OPENPOSE,
    "depth": ControlKind.DEPTH,
    "hed/pidi/scribble/ted": ControlKind.SOFTEDGE,
    "softedge": ControlKind.SOFTEDGE,
    "scribble": ControlKind.SCRIBBLE,
    "canny/lineart/mlsd": ControlKind.CANNY,
    "canny": ControlKind.CANNY,
    "lineart": ControlKind.LINEART,
    "normal map": ControlKind.NORMAL,
    "segmentation": ControlKind.SEGMENTATION,
    "tile": ControlKind.TILE,
    "inpaint": ControlKind.INPAINT,
}


@dataclass(frozen=True, slots=True)
class CannyUnit:
    """A plain unit of edges. `image` is in base64; if it is empty, the unit uses the edges of the input image.

    `shows_map`: the edges follow the generated images in the response.
    """

    image: str
    weight: float
    low: int
    high: int
    shows_map: bool = True


@dataclass(frozen=True, slots=True)
class ChosenUnits:
    """What a request follows: plain edges or control units, whose maps are shown, and sentences about the others."""

    edges: CannyUnit | None = None
    controls: tuple[ControlUnit, ...] = ()
    maps: tuple[bool, ...] = ()
    ignored: tuple[str, ...] = ()


def choose_units(units: Sequence[SentUnit], params: Txt2Img, spec: ModelSpec, context: DialectContext) -> ChosenUnits:
    """Return what the units ask for. Reads folders; blocks. Raises `InvalidInput` for a unit without an image."""
    if not units:
        return ChosenUnits()
    usable = [*context.controlnets.usable(spec).values()]
    if not usable:
        return _edges_alone(units)
    if len(units) == 1 and _is_plain(units[0], params, spec, usable):
        return ChosenUnits(edges=_edges(units[0]))
    controls: list[ControlUnit] = []
    maps, ignored = [], []
    for unit in units:
        control, sentences = _control(unit, len(controls), params, usable, context)
        ignored += [f"controlnet: {sentence}" for sentence in sentences]
        if control is not None:
            controls.append(control)
            maps.append(unit.shows_map)
    return ChosenUnits(controls=tuple(controls), maps=tuple(maps), ignored=tuple(ignored))


def _edges_alone(units: Sequence[SentUnit]) -> ChosenUnits:
    """Return the first unit of edges, for models without a list of networks."""
    edges: CannyUnit | None = None
    ignored = []
    for unit in units:
        if edges is not None or _CANNY not in f"{unit.module} {unit.model}":
            ignored.append(f"controlnet: a unit of {unit.words} is left out; one of canny is taken.")
            continue
        if unit.module == "none":
            ignored.append("controlnet: edges are always found here; a picture of edges is looked at like any other.")
        ignored += [f"controlnet: {name} is not honoured." for name in _odd(unit)]
        edges = _edges(unit)
    return ChosenUnits(edges=edges, ignored=tuple(ignored))


def _edges(unit: SentUnit) -> CannyUnit:
    low = _CANNY_LOW if unit.threshold_a < 0 else round(unit.threshold_a)
    high = _CANNY_HIGH if unit.threshold_b < 0 else round(unit.threshold_b)
    return CannyUnit(unit.image, unit.weight, low, high, unit.shows_map)


def _odd(unit: SentUnit) -> list[str]:
    """Return the fields of a unit that `canny` has no equal of."""
    return [
        name
        for name, is_odd in (
            ("guidance_start", unit.start != 0),
            ("guidance_end", unit.end != 1),
            ("mask", bool(unit.mask)),
            ("control_mode", unit.mode is not ControlMode.BALANCED),
        )
        if is_odd
    ]


def _is_plain(unit: SentUnit, params: Txt2Img, spec: ModelSpec, usable: Sequence[ControlNetwork]) -> bool:
    """Return whether `canny` draws what a unit asks for: with the model's own network, of the input image."""
    if unit.module != _CANNY or _odd(unit) or spec.control_folder is None:
        return False
    own = spec.control_folder.rpartition("/")[2].lower()
    if base_name(unit.model) not in (own, "none") and _named(unit.model, usable) is not None:
        return False
    if not isinstance(params, Img2Img):
        return bool(unit.image)
    # Clients send one of them as a data URL and the other in plain base64, which has no comma.
    same = not unit.image or [_base64(unit.image)] == [*map(_base64, params.init_images or ())]
    return same and not params.mask and not params.script_name


def _base64(image: str) -> str:
    """Return the base64 of an image that may be a data URL."""
    return image.rpartition(",")[2]


def _named(model: str, usable: Sequence[ControlNetwork]) -> ControlNetwork | None:
    wanted = base_name(model)
    return next((one for one in usable if base_name(one.name) in (wanted, wanted.rpartition("/")[2])), None)


def _control(
    unit: SentUnit, number: int, params: Txt2Img, usable: Sequence[ControlNetwork], context: DialectContext
) -> tuple[ControlUnit | None, list[str]]:
    """Return the control unit, `None` if it cannot be followed, and sentences about what is taken in its place."""
    try:
        row = row_of(unit.module, FIELD)
    except InvalidInput:
        return None, [f"a unit of {unit.words} is left out; /controlnet/module_list has the detectors."]
    if not 0 <= unit.start < unit.end <= 1:
        return None, [f"a unit of {unit.words} is left out: it ends before it starts."]
    network, sentences = _named(unit.model, usable), []
    kind = _kind(unit, row, network)
    if network is None and unit.model != "none" and kind is not None:
        sentences.append(f"{unit.model[:50]} is not here; a network for {kind} is taken.")
    if network is None:
        network = next((one for one in usable if kind in one.kinds), None)
    if network is None or kind is None:
        known = ", ".join(one.name for one in usable[:12])
        return None, [f"a unit of {unit.words} is left out: no network here follows it; there are {known}."]
    name = f"controls[{number}]"
    if not unit.image and not isinstance(params, Img2Img):
        raise InvalidInput("A ControlNet unit needs its image here.", field=FIELD)
    control = ControlUnit(
        kind=kind,
        model=network.name,
        image=ImageInput(f"{name}.image", data=bytes_of(unit.image, FIELD)) if unit.image else None,
        mask=ImageInput(f"{name}.mask", data=bytes_of(unit.mask, FIELD)) if unit.mask else None,
        weight=unit.weight,
        start=unit.start,
        end=unit.end,
        preprocess=NO_PREPROCESSOR if row is None else row.name,
        options=() if row is None else tuple(sorted(numbers_of(row, (unit.threshold_a, unit.threshold_b)).items())),
        mode=unit.mode,
        resize=unit.resize,
        resolution=None if row is None or row.keeps_size or unit.pixel_perfect else resolution_of(unit.resolution),
    )
    if row is not None and row.draw is None:
        try:
            context.preprocessor.find(row.name, {}, FIELD)
        except InvalidInput as error:
            return None, [f"a unit of {unit.words} is left out: {error.detail}"]
    return control, sentences


def _kind(unit: SentUnit, row: Preprocessor | None, network: ControlNetwork | None) -> ControlKind | None:
    """Return what the control image shows: as the unit says, its detector, its network, or the network's name."""
    if unit.union_type in _UNION_TYPES:
        return _UNION_TYPES[unit.union_type]
    if is_inpainting(unit.module):
        return ControlKind.INPAINT
    made = [ControlKind(kind) for kind in (row.kinds if row is not None else ()) if kind in tuple(ControlKind)]
    followed = network.kinds if network is not None else ()
    if shared := [kind for kind in made if kind in followed] or made:
        return shared[0]
    if len(followed) == 1:
        return followed[0]
    return next((kind for word, kind in _WORDS.items() if word in base_name(unit.model)), None)
