"""Reads the units of AUTOMATIC1111's ControlNet extension: uses one Canny unit, and warns about others.

Values are coerced as its Pydantic models do: texts for numbers and booleans, 0 and 1 for booleans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stable_diffusion_server.errors import InvalidInput

_CANNY_LOW, _CANNY_HIGH = 100, 200
_FIELD = "alwayson_scripts"
# Fields of a unit without effect here, with their neutral values, as texts in lower case.
_IGNORED = {
    "guidance_start": ("0", "0.0"),
    "guidance_end": ("1", "1.0"),
    "mask": ("",),
    "mask_image": ("",),
    "control_mode": ("0", "balanced"),
}
# A script that the masks read.
SOFT_INPAINTING = "soft inpainting"
_KNOWN_SCRIPTS = ("controlnet", SOFT_INPAINTING, "adetailer")
_LARGEST = 1_000_000
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)
_NUMBER: TypeAdapter[float] = TypeAdapter(float, config=ConfigDict(allow_inf_nan=False))
# Longer texts are no numbers.
_LONGEST_NUMBER = 40

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CannyUnit:
    """A Canny unit. `image` is in base64; if it is empty, the unit uses the edges of the input image.

    `shows_map`: the edges follow the generated images in the response.
    """

    image: str
    weight: float
    low: int
    high: int
    shows_map: bool = True


def parse_units(scripts: Mapping[str, Any]) -> tuple[CannyUnit | None, list[str]]:
    """Return the first Canny unit, and sentences about ignored scripts and units.

    Raises `InvalidInput` for malformed units.
    """
    ignored = [
        f"alwayson_scripts: {name[:50]} is not known here."
        for name, script in scripts.items()
        if _is_unknown(name, script)
    ]
    found: CannyUnit | None = None
    for unit in _units(scripts):
        kind = f"{unit.get('module') or ''} {unit.get('model') or ''}".lower()
        if not _coerced(unit, "enabled", True, _flag):
            continue
        if found is not None or "canny" not in kind:
            ignored.append(
                f"controlnet: a unit of {kind.strip()[:50] or 'no kind'} is left out; one of canny is taken."
            )
            continue
        if str(unit.get("module") or "none").lower() == "none":
            ignored.append("controlnet: edges are always found here; a picture of edges is looked at like any other.")
        image, mask = _image_of(unit)
        ignored += [
            f"controlnet: {name} is not honoured."
            for name, neutral in _IGNORED.items()
            if _is_odd({"mask": mask, **unit}, name, neutral)
        ]
        found = CannyUnit(
            image=image,
            weight=_coerced(unit, "weight", 1.0, _number),
            low=_threshold(unit, "threshold_a", _CANNY_LOW),
            high=_threshold(unit, "threshold_b", _CANNY_HIGH),
            shows_map=_coerced(unit, "save_detected_map", True, _flag),
        )
    return found, ignored


def _units(scripts: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name, script in scripts.items():
        if name.lower() == "controlnet":
            units = script.get("args") if isinstance(script, dict) else None
            if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
                raise InvalidInput("alwayson_scripts.controlnet.args must be a list of units.", field=_FIELD)
            return units
    return []


def _is_unknown(name: str, script: object) -> bool:
    """Return whether a script is unknown and has arguments."""
    args = script.get("args") if isinstance(script, dict) else script
    return name.lower() not in _KNOWN_SCRIPTS and args not in ([], [False], None)


def _image_of(unit: Mapping[str, Any]) -> tuple[str, str]:
    """Return the image of a unit and its mask, which are texts, or together in an object. Raises `InvalidInput`."""
    given = next((unit[name] for name in ("image", "input_image") if unit.get(name)), "")
    image, mask = (given.get("image") or "", given.get("mask") or "") if isinstance(given, dict) else (given, "")
    if not isinstance(image, str) or not isinstance(mask, str):
        raise InvalidInput("controlnet: image must be a picture in base64, or an object with one.", field=_FIELD)
    return image, mask


def _is_odd(unit: Mapping[str, Any], name: str, neutral: tuple[str, ...]) -> bool:
    value = unit.get(name)
    return value is not None and str(value)[:_LONGEST_NUMBER].lower() not in neutral


def _threshold(unit: Mapping[str, Any], name: str, default: int) -> int:
    value = _coerced(unit, name, -1.0, _number)
    return round(value) if value >= 0 else default


def _coerced(unit: Mapping[str, Any], name: str, default: T, read: Callable[[str, object], T]) -> T:
    return default if unit.get(name) is None else read(name, unit[name])


def _flag(name: str, value: object) -> bool:
    return _validated(_FLAG, name, value, "true or false")


def _number(name: str, value: object) -> float:
    number = _validated(_NUMBER, name, None if isinstance(value, bool) else value, "a number")
    if abs(number) > _LARGEST:
        raise InvalidInput(f"controlnet: {name} must be a number.", field=_FIELD)
    return number


def _validated(adapter: TypeAdapter[T], name: str, value: object, expected: str) -> T:
    try:
        return adapter.validate_python(value[:_LONGEST_NUMBER] if isinstance(value, str) else value)
    except ValidationError as error:
        raise InvalidInput(f"controlnet: {name} must be {expected}.", field=_FIELD) from error
