"""Finds a model that draws the task of a request; checks its references and its further parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation.library import OfferedModels, permitted_models, with_permitted_model
from stable_diffusion_server.generation.limits import range_sentence
from stable_diffusion_server.pipelines import TRUE_GUIDANCE, ModelSpec
from stable_diffusion_server.types import Caller, ExtraValue, GenerationRequest, Task

# Models that a sentence names at most.
_NAMED = 6
_WORDS: Mapping[Task, str] = {
    Task.TEXT_TO_IMAGE: "draw from text alone",
    Task.IMAGE_TO_IMAGE: "change an image by strength",
    Task.INPAINT: "repaint what a mask covers",
    Task.EDIT: "edit images by instruction",
}


def permitted_request(request: GenerationRequest, caller: Caller, options: OfferedModels) -> GenerationRequest:
    """Return the request with a model that the caller may use and that draws it. Raises `Forbidden`, `InvalidInput`."""
    request = with_permitted_model(request, caller, options)
    return with_able_model(request, permitted_models(options.models, caller), options.default_model)


def with_able_model(
    request: GenerationRequest, models: Mapping[str, ModelSpec], default_model: str
) -> GenerationRequest:
    """Return the request with a model that draws its task, `models` being those that the caller may use.

    A request that names no model gets the first one that draws its task, with all its references if there is one, if
    the default model does not. Raises `InvalidInput`, with the names of models that can, for a named model that does
    not, and where none does.
    """
    spec = models.get(request.model or default_model) or next(iter(models.values()), None)
    if spec is None or (request.model is not None and request.model not in models):
        return request  # refused by name later
    if request.task not in spec.tasks:
        able_ones = {name: one.max_references for name, one in models.items() if request.task in one.tasks}
        enough = (name for name, most in able_ones.items() if most >= len(request.references))
        other = next(enough, next(iter(able_ones), None))
        if request.model is not None or other is None:
            raise InvalidInput(
                f"{spec.name} does not {_WORDS[request.task]}; {able(request.task, models)}.", field="model"
            )
        request, spec = replace(request, model=other), models[other]
    if len(request.references) > spec.max_references:
        field = request.references[spec.max_references].parameter
        most = "takes no reference image" if spec.max_references == 0 else f"takes at most {spec.max_references}"
        raise InvalidInput(f"{spec.name} {most}, and {len(request.references)} are given.", field=field)
    return request


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


def negative_prompt_scale(
    spec: ModelSpec, guidance: float, extra: Iterable[tuple[str, ExtraValue]]
) -> tuple[float, str]:
    """Return the scale that a negative prompt acts with (only above 1), and the name of the parameter that sets it.

    That is guidance, except for models that are distilled with theirs.
    """
    own = next((parameter for parameter in spec.extra if parameter.name == TRUE_GUIDANCE), None)
    if own is None:
        return guidance, "guidance"
    return float(dict(extra).get(own.name, own.default)), f"extra.{own.name}"


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(names)}" if names else "it has none of its own"
