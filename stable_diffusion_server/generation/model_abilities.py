"""Checks that a model draws the task of a request, and takes its references and its further parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.limits import range_sentence
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import ExtraValue, GenerationRequest, Task

# Models that a sentence names at most.
_NAMED = 6
_WORDS: Mapping[Task, str] = {
    Task.TEXT_TO_IMAGE: "draw from text alone",
    Task.IMAGE_TO_IMAGE: "change an image by strength",
    Task.INPAINT: "repaint what a mask covers",
    Task.EDIT: "edit images by instruction",
}


def check_task(request: GenerationRequest, spec: ModelSpec, models: Mapping[str, ModelSpec]) -> None:
    """Raise `InvalidInput` if the model does not draw the task; the sentence names models here that do."""
    if request.task not in spec.tasks:
        raise InvalidInput(f"{spec.name} does not {_WORDS[request.task]}; {able(request.task, models)}.", field="model")
    if len(request.references) > spec.max_references:
        field = request.references[spec.max_references].parameter
        most = "takes no reference image" if spec.max_references == 0 else f"takes at most {spec.max_references}"
        raise InvalidInput(f"{spec.name} {most}, and {len(request.references)} are given.", field=field)


def able(task: Task, models: Mapping[str, ModelSpec]) -> str:
    """Return which models draw a task, as a clause."""
    names = [name for name, spec in models.items() if task in spec.tasks]
    if not names:
        return f"no model here can {_WORDS[task]}"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"those that can are {', '.join(names[:_NAMED])}{more}"


def check_extra(extra: Iterable[tuple[str, ExtraValue]], spec: ModelSpec) -> None:
    """Raise `InvalidInput` naming each parameter that the model does not have, or whose value is out of its range.

    What only the model's diffusers class knows is checked when the request is prepared.
    """
    if spec.any_extra:
        return
    known = {parameter.name: parameter for parameter in spec.extra}
    faults = []
    for name, value in extra:
        field = f"extra.{name}"
        if name not in known:
            faults.append((field, f"{name[:100]!r} is no parameter of {spec.name}; {_listed([*known])}."))
        elif isinstance(value, bool | str) or not math.isfinite(value):
            faults.append((field, f"{field} must be a number."))
        elif not known[name].low <= value <= known[name].high:
            faults.append((field, range_sentence(field, known[name].low, known[name].high)))
    if faults:
        raise InvalidInput.from_faults(faults)


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(names)}" if names else "it has none of its own"
