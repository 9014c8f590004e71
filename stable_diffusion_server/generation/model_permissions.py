"""Which models a caller may use: all, or those that its API key names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from stable_diffusion_server.errors import Forbidden
from stable_diffusion_server.generation.resolver import GenerationOptions
from stable_diffusion_server.pipelines import ModelSpec, known_names
from stable_diffusion_server.types import Caller, GenerationRequest


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


def with_permitted_model(request: GenerationRequest, caller: Caller, options: GenerationOptions) -> GenerationRequest:
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
