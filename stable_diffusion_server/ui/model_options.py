"""Choices, defaults, hints and example prompts of the form fields, from the server's list of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Model = Mapping[str, Any]
Models = Sequence[Model]

SIZES = ((256, 256), (512, 512), (768, 512), (512, 768), (1024, 1024))
DEFAULT_SIDE = 512
# Sizes below this many bytes are not shown.
_SMALL = 50_000_000

EMBEDDED_PROMPTS = (
    "a red circle on a blue background",
    "a large yellow star on a purple background",
    "a small green triangle in the top left on a white background",
    "a pink heart above a blue square on a black background",
    "three orange hexagons on a cyan background",
    "a white cross on a brown background",
)
PROMPTS = (
    "a lighthouse on a cliff at dusk, oil painting",
    "portrait of an old sailor, soft window light",
    "a cup of coffee beside a rainy window, photograph",
    "a fox in the snow, woodblock print",
)
EMBEDDED_WORDS = (
    "The embedded models know circles, squares, triangles, stars, diamonds, hexagons, hearts and crosses in red, "
    "green, blue, yellow, orange, purple, pink, cyan, white, black, gray and brown, on a background of another colour."
)

NONE_EDITS = (
    "No model of this server looks at reference pictures, so nothing can be edited here. FLUX.2 klein, FLUX.1 Kontext "
    "and Qwen-Image-Edit do, once they are in the models' folder."
)


def is_embedded(models: Models) -> bool:
    """Return whether the server uses the embedded models; also true while the models are unknown."""
    return not models or any(str(model.get("folder", "")).startswith("embedded") for model in models)


def prompts(models: Models) -> tuple[str, ...]:
    """Return example prompts."""
    return EMBEDDED_PROMPTS if is_embedded(models) else PROMPTS


def words(models: Models) -> str:
    """Return a text about the subjects that the embedded models can draw; empty for real models."""
    return EMBEDDED_WORDS if is_embedded(models) else ""


def chosen(models: Models, name: str) -> Model:
    """Return a model by name, the default model for an empty name, an empty mapping if no model is known."""
    wanted = (model for model in models if (model["name"] == name if name else model.get("usual")))
    return next(wanted, models[0] if models else {})


def choices(models: Models) -> list[tuple[str, str]]:
    """Return the choices as (label, name); the first choice means the server's default model."""
    if not models:
        return [("The server's own choice", "")]
    default = f"The server's own choice ({chosen(models, '')['name']})"
    return [(default, ""), *((label(model), str(model["name"])) for model in models)]


def editing(models: Models) -> list[Model]:
    """Return the models that edit images by instruction; the one that is used without a choice is the first."""
    able = [model for model in models if "edit" in model.get("tasks", ())]
    return sorted(able, key=lambda model: not model.get("usual"))


def editing_choices(models: Models) -> list[tuple[str, str]]:
    """Return the choices among `editing`'s models as (label, name)."""
    return [(label(model), str(model["name"])) for model in models] or [("There is none", "")]


def most_references(model: Model) -> str:
    """Return how many images a model of `editing` looks at, as a sentence; which models do, for an empty mapping."""
    if not model:
        return NONE_EDITS
    most = int(model.get("max_references", 1))
    pictures = "one picture" if most == 1 else f"up to {most} pictures, in this order"
    return f"{model['name']} looks at {pictures}."


def label(model: Model) -> str:
    """Return a model as the picker shows it: name, family or folder, size, and where it is unless it is in memory."""
    name, folder, size = str(model["name"]), str(model.get("folder", "")), int(model.get("bytes") or 0)
    place = {"unloaded": "loaded when it is needed", "loading": "being loaded"}.get(str(model.get("residency")), "")
    kind = str(model.get("family", "")) if folder.startswith(name) else folder
    return " · ".join(part for part in (name, kind, f"{size / 1e9:.1f} GB" if size >= _SMALL else "", place) if part)


def names(models: Models) -> list[str]:
    """Return the names of the models."""
    return [str(model["name"]) for model in models]


def defaults(model: Model) -> tuple[str, str, str]:
    """Return the hints of a model's default steps and guidance, and of the negative prompt field."""
    steps, guidance = model.get("default_steps"), model.get("default_guidance")
    takes_guidance, negative = model.get("takes_guidance", True), model.get("takes_negative_prompt", True)
    return (
        f"{steps}, its own" if steps is not None else "its own",
        "it takes none" if not takes_guidance else f"{guidance:g}, its own" if guidance is not None else "its own",
        "What should not be seen." if negative else f"{str(model['name']).capitalize()} has no use for it.",
    )


def side(model: Model) -> int:
    """Return the side of the offered square closest to the model's native size, in pixels."""
    best = math.isqrt(int(model.get("native_pixels", DEFAULT_SIDE**2)))
    squares = [width for width, height in SIZES if width == height]
    return min(squares, key=lambda square: abs(math.log(square / best)))


def preset(width: float | None, height: float | None) -> str | None:
    """Return the preset of a size, `None` without a match."""
    return next((f"{wide}x{high}" for wide, high in SIZES if (wide, high) == (width, height)), None)
