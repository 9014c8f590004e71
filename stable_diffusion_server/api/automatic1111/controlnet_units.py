"""Reads the units of AUTOMATIC1111's ControlNet extension.

Values are coerced as its Pydantic models do: texts for numbers and booleans, 0 and 1 for booleans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.types import ControlMode, ControlResize

_FIELD = "alwayson_scripts"
# A script that the masks read.
SOFT_INPAINTING = "soft inpainting"
_KNOWN_SCRIPTS = ("controlnet", SOFT_INPAINTING, "adetailer")
_MODES: Mapping[str, ControlMode] = {
    **dict.fromkeys(("0", "balanced"), ControlMode.BALANCED),
    **dict.fromkeys(("1", "my prompt is more important"), ControlMode.PROMPT),
    **dict.fromkeys(("2", "controlnet is more important"), ControlMode.CONTROL),
}
_RESIZES: Mapping[str, ControlResize] = {
    **dict.fromkeys(("0", "just resize"), ControlResize.STRETCH),
    **dict.fromkeys(
        ("1", "crop and resize", "inner fit (scale to fit)", "scale to fit (inner fit)"), ControlResize.CROP
    ),
    **dict.fromkeys(("2", "resize and fill", "outer fit (shrink to fit)", "envelope (outer fit)"), ControlResize.PAD),
}
_MASKS = ("effective_region_mask", "mask", "mask_image")
# Units of one request that are read, enabled or not.
_MOST_UNITS = 64
_LARGEST = 1_000_000
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)
_NUMBER: TypeAdapter[float] = TypeAdapter(float, config=ConfigDict(allow_inf_nan=False))
# Longer texts are no numbers, and no names.
_LONGEST_NUMBER, _LONGEST_NAME = 40, 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SentUnit:
    """An enabled unit as it was sent.

    `image` and `mask` are in base64; without an image the unit uses the input image. `resolution` is -1 for the usual
    one, and thresholds below 0 are the detector's. `shows_map`: its control image follows the generated ones.
    """

    module: str = "none"
    model: str = "none"
    union_type: str = ""
    image: str = ""
    mask: str = ""
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: ControlMode = ControlMode.BALANCED
    resize: ControlResize = ControlResize.CROP
    pixel_perfect: bool = False
    resolution: float = -1.0
    threshold_a: float = -1.0
    threshold_b: float = -1.0
    shows_map: bool = True

    @property
    def words(self) -> str:
        """Its detector and its model, as a sentence names them."""
        return " ".join(name for name in (self.module, self.model) if name != "none")[:50] or "no kind"


def parse_units(scripts: Mapping[str, Any]) -> tuple[list[SentUnit], list[str]]:
    """Return the enabled units, and sentences about unknown scripts. Raises `InvalidInput` for malformed units."""
    ignored = [
        f"alwayson_scripts: {name[:50]} is not known here."
        for name, script in scripts.items()
        if _is_unknown(name, script)
    ]
    return [_unit(unit) for unit in _units(scripts) if _coerced(unit, "enabled", True, _flag)], ignored


def _unit(unit: Mapping[str, Any]) -> SentUnit:
    image, mask = _image_of(unit)
    return SentUnit(
        module=_name(unit, "module") or "none",
        model=_name(unit, "model") or "none",
        union_type=_name(unit, "union_control_type"),
        image=image,
        mask=mask,
        weight=_coerced(unit, "weight", 1.0, _number),
        start=_coerced(unit, "guidance_start", 0.0, _number),
        end=_coerced(unit, "guidance_end", 1.0, _number),
        mode=_chosen(unit, "control_mode", _MODES),
        resize=_chosen(unit, "resize_mode", {**_RESIZES, "": ControlResize.CROP}),
        pixel_perfect=_coerced(unit, "pixel_perfect", False, _flag),
        resolution=_coerced(unit, "processor_res", -1.0, _number),
        threshold_a=_coerced(unit, "threshold_a", -1.0, _number),
        threshold_b=_coerced(unit, "threshold_b", -1.0, _number),
        shows_map=_coerced(unit, "save_detected_map", True, _flag),
    )


def _units(scripts: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name, script in scripts.items():
        if name.lower() == "controlnet":
            units = script.get("args") if isinstance(script, dict) else None
            if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
                raise InvalidInput("alwayson_scripts.controlnet.args must be a list of units.", field=_FIELD)
            if len(units) > _MOST_UNITS:
                raise InvalidInput(f"alwayson_scripts.controlnet.args has more than {_MOST_UNITS} units.", field=_FIELD)
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
    mask = next((unit[name] for name in _MASKS if unit.get(name)), mask)
    if not isinstance(image, str) or not isinstance(mask, str):
        raise InvalidInput("controlnet: image must be a picture in base64, or an object with one.", field=_FIELD)
    return image, mask


def _name(unit: Mapping[str, Any], field: str) -> str:
    value = unit.get(field)
    if value is not None and not (isinstance(value, str) and len(value) <= _LONGEST_NAME):
        sentence = f"controlnet: {field} must be a text of up to {_LONGEST_NAME} characters."
        raise InvalidInput(sentence, field=_FIELD)
    return (value or "").strip().lower()


def _chosen(unit: Mapping[str, Any], field: str, choices: Mapping[str, T]) -> T:
    """Return the choice of a field by its number or its words, the first one without a value. Raises `InvalidInput`."""
    value = unit.get(field)
    if value is None:
        return choices.get("", next(iter(choices.values())))
    words = str(value)[:_LONGEST_NUMBER].strip().lower() if isinstance(value, str | int | float) else "?"
    found = choices.get(words.removesuffix(".0"))
    if found is None or isinstance(value, bool):
        raise InvalidInput(f"controlnet: {field} must be 0, 1, 2 or one of its words.", field=_FIELD)
    return found


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
