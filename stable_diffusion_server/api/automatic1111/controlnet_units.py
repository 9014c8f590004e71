"""Reads the units of AUTOMATIC1111's ControlNet extension: uses one Canny unit, and warns about others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_diffusion_server.errors import InvalidInput

_CANNY_LOW, _CANNY_HIGH = 100, 200
_FIELD = "alwayson_scripts"
_IGNORED = {"guidance_start": (0, 0.0), "guidance_end": (1, 1.0), "mask": (None, ""), "control_mode": (0, "Balanced")}


@dataclass(frozen=True, slots=True)
class CannyUnit:
    """A Canny unit. `image` is in base64; if it is empty, the unit uses the edges of the input image."""

    image: str
    weight: float
    low: int
    high: int


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
        if not unit.get("enabled", True):
            continue
        if found is not None or "canny" not in kind:
            ignored.append(
                f"controlnet: a unit of {kind.strip()[:50] or 'no kind'} is left out; one of canny is taken."
            )
            continue
        if str(unit.get("module") or "none").lower() == "none":
            ignored.append("controlnet: edges are always found here; a picture of edges is looked at like any other.")
        ignored += [
            f"controlnet: {name} is not honoured." for name, neutral in _IGNORED.items() if _is_odd(unit, name, neutral)
        ]
        found = CannyUnit(
            image=str(unit.get("image") or unit.get("input_image") or ""),
            weight=_number(unit, "weight", 1.0),
            low=_threshold(unit, "threshold_a", _CANNY_LOW),
            high=_threshold(unit, "threshold_b", _CANNY_HIGH),
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
    return name.lower() != "controlnet" and args not in ([], [False], None)


def _is_odd(unit: Mapping[str, Any], name: str, neutral: tuple[object, ...]) -> bool:
    return unit.get(name) is not None and unit[name] not in neutral


def _threshold(unit: Mapping[str, Any], name: str, default: int) -> int:
    value = _number(unit, name, -1)
    return round(value) if value >= 0 else default


def _number(unit: Mapping[str, Any], name: str, default: float) -> float:
    value = unit.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1_000_000:
        raise InvalidInput(f"controlnet: {name} must be a number.", field=_FIELD)
    return float(value)
