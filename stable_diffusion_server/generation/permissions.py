"""What a caller may use: the images that it owns, the models of its API key, and what these models draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from stable_diffusion_server.errors import Forbidden, InvalidInput, ModelLoadError
from stable_diffusion_server.generation.limits import range_sentence
from stable_diffusion_server.generation.tiling import check_tiling
from stable_diffusion_server.pipelines import TRUE_GUIDANCE, ModelSpec, check_class_extra, known_names, spec_of
from stable_diffusion_server.types import Caller, ExtraValue, GenerationRequest, MaskMode, StoredObject, Task

_OWNER = "owner"
# Models that a sentence names at most.
_NAMED = 6
_WORDS: Mapping[Task, str] = {
    Task.TEXT_TO_IMAGE: "draw from text alone",
    Task.IMAGE_TO_IMAGE: "change an image by strength",
    Task.INPAINT: "repaint what a mask covers",
    Task.EDIT: "edit images by instruction",
    Task.UPSCALE: "enlarge images",
}


@dataclass(frozen=True, slots=True)
class Ownership:
    """Decides which caller owns an image. `keyed` is an HMAC with the server's secret; `None` without API keys.

    `folder` holds all images. With `private`, image URLs are signed. An object's record holds the owner as an HMAC, so
    that a public bucket reveals no names of API keys.
    """

    keyed: Callable[[str], str] | None = None
    folder: str = ""
    private: bool = False

    def conceal(self, digest: str, request: GenerationRequest) -> str:
        """Return the digest to use in an object key: with API keys, an HMAC that differs per API key.

        Equal requests of two API keys get different object keys, so neither caller learns about the other's request.
        """
        return digest if self.keyed is None else self.keyed(f"name\n{request.named_for}\n{digest}")

    def owner_record(self, caller: Caller) -> dict[str, str]:
        """Return the owner entry of an object's record; empty without API keys."""
        return {_OWNER: self._mark(caller)} if self.keyed is not None and caller.name else {}

    def owns(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller owns an image: its API key made it, or the object key is under the API key's prefix."""
        if caller.prefix and stored.key.startswith(self.folder + caller.prefix):
            return True
        return self.keyed is not None and bool(caller.name) and stored.record.get(_OWNER) == self._mark(caller)

    def may_know(self, caller: Caller, stored: StoredObject) -> bool:
        """Whether the caller may learn that an image was stored before its request. Always true without API keys."""
        return self.keyed is None or caller.has_full_access or self.owns(caller, stored)

    def visible_record(self, caller: Caller, stored: StoredObject, *, named: bool) -> bool:
        """`may_know` for the result of a request; `named`: the request chose the object key.

        Raises `Forbidden` if the result would give a private image to another API key that guessed its object key.
        """
        may_know = self.may_know(caller, stored)
        if self.private and named and not may_know:
            raise Forbidden("Another key has taken this name.", field="save_path")
        return may_know

    def check_overwrite(self, caller: Caller, stored: StoredObject | None) -> None:
        """Raise `Forbidden` for an image the caller must not overwrite."""
        if stored is not None and not (caller.has_full_access or self.owns(caller, stored)):
            raise Forbidden("The picture of this name was made by another key.", field="save_path")

    def _mark(self, caller: Caller) -> str:
        return self.keyed(f"owner\n{caller.name}")[:32] if self.keyed is not None else ""


class OfferedModels(Protocol):
    """The models of the server, the default one, and why others cannot be used."""

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """The models by name."""

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""

    @property
    def unusable(self) -> Mapping[str, str]:
        """Reasons by name."""


class PermittedModels(Mapping[str, ModelSpec]):
    """The models of `whole` that `names` name, by name or alias; in the order of `names`.

    They are looked up at each access, since models come and go.
    """

    def __init__(self, whole: Mapping[str, ModelSpec], names: tuple[str, ...]) -> None:
        self._whole = whole
        self._names = names

    def __getitem__(self, name: str) -> ModelSpec:
        spec = self._whole[name]
        if spec.name not in set(self):
            raise KeyError(name)
        return spec

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(self._whole[name].name for name in self._names if name in self._whole))

    def __len__(self) -> int:
        return len(list(iter(self)))


def permitted_models(models: Mapping[str, ModelSpec], caller: Caller) -> Mapping[str, ModelSpec]:
    """Return the models that a caller may use."""
    return models if caller.uses_all_models else PermittedModels(models, caller.models)


def not_permitted(name: str, models: Mapping[str, ModelSpec]) -> str:
    """Return the sentence about a model that is not among those that a caller may use, whether there is one or not."""
    if not models:
        return "The models that this key may use are not here."
    return f"This key may not use the model {name[:100]!r}; for it {known_names(name, sorted(models))}."


def with_permitted_model(request: GenerationRequest, caller: Caller, options: OfferedModels) -> GenerationRequest:
    """Return the request with a model that the caller may use: the first of them if it names none.

    Raises `Forbidden` for another model, and equally for one that there is not.
    """
    if caller.uses_all_models:
        return request
    models = permitted_models(options.models, caller)
    wanted = request.model or options.default_model
    if wanted in models:
        return replace(request, model=models[wanted].name)
    if wanted in options.unusable and wanted in caller.models:
        return replace(request, model=wanted)  # refused with the reason
    if request.model is None and models:
        return replace(request, model=next(iter(models)))
    raise Forbidden(not_permitted(wanted, models), field="model")


def spec_for(request: GenerationRequest, options: OfferedModels) -> ModelSpec:
    """Return the spec of the request's model.

    If the request names no model and the default model is missing, returns the first usable model. Raises
    `InvalidInput` for an unknown model, `ModelLoadError` for one that could not be loaded.
    """
    wanted = request.model or options.default_model
    spec = options.models.get(wanted)  # an alias leads to a model of another name
    if {wanted, spec.name if spec else wanted} & set(options.unusable):
        raise ModelLoadError(f"The files of {wanted} cannot be used; /readyz and the server's log say why.")
    return spec_of(next(iter(options.models)) if request.model is None and spec is None else wanted, options.models)


def permitted_request(request: GenerationRequest, caller: Caller, options: OfferedModels) -> GenerationRequest:
    """Return the request with a model that the caller may use and that draws it. Raises `Forbidden`, `InvalidInput`."""
    if request.task is Task.UPSCALE:  # upscalers are no models
        return request
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


def check_extra(extra: Iterable[tuple[str, ExtraValue]], spec: ModelSpec, task: Task = Task.TEXT_TO_IMAGE) -> None:
    """Raise `InvalidInput` naming each parameter that the model does not have, or whose value is out of its range.

    Of a model that its diffusers class draws, they are those of the class that draws the task.
    """
    if spec.any_extra:
        check_class_extra(extra, spec, task)
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


def reads_empty_negative(spec: ModelSpec) -> bool:
    """Return whether the model draws otherwise with an empty negative prompt than with none."""
    return spec.takes_negative_prompt and spec.reads_empty_negative


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(names)}" if names else "it has none of its own"


def adapters_for(request: GenerationRequest, loras: Callable[[], Mapping[str, str]]) -> list[tuple[str, float, str]]:
    """Return name, weight and content digest of each LoRA. Raises `InvalidInput` for an unknown LoRA."""
    if not request.loras:
        return []
    there = loras()
    digests = {}
    for name, _ in request.loras:
        try:
            digests[name] = there[name]
        except KeyError as error:
            names = ", ".join(sorted(there))
            said = f"{name!r} is not an adapter here; there are {names}." if names else "No adapters are offered here."
            raise InvalidInput(said, field="lora") from error
    return [(name, weight, digests[name]) for name, weight in request.loras]


def check_abilities(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise `InvalidInput` if the request has what only other models can do, or edges between wrong thresholds."""
    if request.canny and spec.control_folder is None:
        raise InvalidInput(f"{spec.name} has no ControlNet to follow edges with.", field="canny")
    if request.canny_low > request.canny_high:
        sentence = "canny_low must not be above canny_high."
        raise InvalidInput.from_faults([("canny_low", sentence), ("canny_high", sentence)])
    if request.tiling is not None:
        check_tiling(request, spec)
    if request.mask_mode is MaskMode.SOFT and request.mask is None and request.extend is None:
        raise InvalidInput("mask_mode is for requests with a mask.", field="mask_mode")
    if request.mask_mode is MaskMode.SOFT and spec.any_extra:
        raise InvalidInput(f"{spec.name} is drawn by its diffusers class, which has no soft masks.", field="mask_mode")
    if request.clip_skip is not None and not spec.usual_clip_skip:
        raise InvalidInput(f"{spec.name} has no CLIP whose layers can be left out.", field="clip_skip")
    if request.prompt_2 is not None and not spec.takes_prompt_2:
        raise InvalidInput(f"{spec.name} has no second text encoder that reads a prompt of its own.", field="prompt_2")
