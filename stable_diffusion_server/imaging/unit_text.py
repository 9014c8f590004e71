"""Control units in AUTOMATIC1111's parameters text, as its ControlNet extension writes them."""

from __future__ import annotations

from collections.abc import Mapping

_RESIZES = {"stretch": "Just Resize", "crop": "Crop and Resize", "pad": "Resize and Fill"}
_MODES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
}
_RESOLUTION = "resolution"
# Units that a text shows, and characters of a name in it.
_MOST_UNITS, _LONGEST = 16, 200
_SEPARATORS = str.maketrans({",": " ", ":": " ", "\n": " "})


def unit_pairs(controls: object) -> dict[str, str]:
    """Return `ControlNet 0` and so on with the text of each unit in a record, which may come from any file."""
    listed = controls if isinstance(controls, list | tuple) else ()
    units = [unit for unit in listed if isinstance(unit, Mapping)]
    return {f"ControlNet {number}": _text(unit) for number, unit in enumerate(units[:_MOST_UNITS])}


def _text(unit: Mapping[str, object]) -> str:
    options = unit.get("options")
    numbers = dict(options) if isinstance(options, Mapping) else {}
    resolution = numbers.pop(_RESOLUTION, 0)
    revision = unit.get("revision")
    name = f"{unit.get('network')} [{revision[:8]}]" if isinstance(revision, str) and revision else unit.get("network")
    pairs: dict[str, object] = {
        "Module": unit.get("preprocess"),
        "Model": name,
        "Weight": unit.get("weight"),
        "Resize Mode": _RESIZES.get(str(unit.get("resize"))),
        "Processor Res": resolution or None,
        **dict(zip(("Threshold A", "Threshold B"), numbers.values(), strict=False)),
        "Guidance Start": unit.get("start"),
        "Guidance End": unit.get("end"),
        "Pixel Perfect": not resolution,
        "Control Mode": _MODES.get(str(unit.get("mode"))),
    }
    return ", ".join(f"{name}: {_shown(value)}" for name, value in pairs.items() if value is not None)


def _shown(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)[:_LONGEST]
    return text.translate(_SEPARATORS)
