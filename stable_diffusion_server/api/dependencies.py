"""What routes depend on: the caller and the caller's part of the bucket; limits and models for the dialects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from fastapi import Request

from stable_diffusion_server.errors import Forbidden, InvalidInput, NotFound, ServerError
from stable_diffusion_server.generation import (
    NO_CONTROLNETS,
    NO_UPSCALER,
    ControlNetworks,
    DetailDetector,
    ImagePreprocessor,
    ImagePromptAdapters,
    ImageUpscaler,
    InProcessPreprocessor,
    NoDetector,
    PromptExpander,
    RequestLimits,
    not_permitted,
    permitted_models,
)
from stable_diffusion_server.pipelines import Embedding, ImagePromptFolder, ModelSpec, known_names
from stable_diffusion_server.types import Caller, GenerationRequest

_OPENAI_MODELS = ("gpt-image-", "chatgpt-image-", "dall-e-")

# Embeddings by name: those that fit a model, and the others, `None` for one that cannot be read.
EmbeddingLists = tuple[Mapping[str, Embedding], Mapping[str, Embedding | None]]

# Makes the URL of an object key as the client of a request can reach it.
UrlOf = Callable[[Request, str], str]


def caller_of(request: Request) -> Caller:
    """Return the caller that the access middleware identified."""
    caller = request.scope.get("state", {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller(anonymous=True)


def scope_to_caller(caller: Caller, generation: GenerationRequest) -> GenerationRequest:
    """Return the request with its object key inside the prefix of its caller.

    Raises `Forbidden` for a key outside of that prefix, and for an anonymous request with `overwrite`.
    """
    if caller.anonymous and generation.overwrite:
        raise Forbidden("Without a key nothing is overwritten.", field="overwrite")
    generation = replace(generation, named_for=caller.name or ("anonymous" if caller.anonymous else ""))
    if not caller.prefix:
        return generation
    if generation.save_path is None:
        return replace(generation, folder=caller.prefix)
    if not generation.save_path.startswith(caller.prefix):
        raise Forbidden(f"With this key names begin with {caller.prefix}.", field="save_path")
    return generation


def check_operator(caller: Caller) -> None:
    """Raise `Forbidden` unless the caller may change what all callers share."""
    if not caller.has_full_access:
        raise Forbidden("Models are loaded, unloaded and searched for with an admin key only.")


class ModelChanges(Protocol):
    """Changes which models are in memory, and which are known."""

    async def load(self, model: str, caller: Caller) -> None:
        """Load a model. Raises `ModelLoadError`, `NotReady` and `QueueFull`."""

    async def unload(self, model: str) -> None:
        """Unload a model when no request uses it. Raises `NotReady` and `ModelStays`."""

    async def refresh(self) -> None:
        """Read MODELS_DIR again. Raises `ModelLoadError` and `ModelStays`."""


@dataclass(frozen=True, slots=True)
class DialectContext:
    """Limits, models by name, their aliases, and the names of the LoRAs.

    `max_n` is the maximum number of images per request, `max_response_bytes` that of bytes of base64 per response.
    `embeddings` returns those in the folder by a model's name. `device_memory` returns bytes by device and kind.
    `status_of` returns family, size and place of a model by its name.
    `response_format` is what the OpenAI endpoints answer if a request does not say it: url, b64_json or auto.
    `limited`: the caller may use these models only, of more. `expander` knows the styles and wildcards, `upscaler` the
    upscalers, `detector` the detectors of details, `controlnets` the networks of control units, `preprocessor` what
    makes their images, and `image_prompts` what reads those.
    """

    limits: RequestLimits
    models: Mapping[str, ModelSpec]
    default_model: str
    aliases: Mapping[str, str]
    max_n: int
    max_response_bytes: int
    loras: Callable[[], Iterable[str]] = tuple
    embeddings: Callable[[str], EmbeddingLists] = lambda model: ({}, {})
    device_memory: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    response_format: str = "auto"
    status_of: Callable[[str], Mapping[str, object]] = lambda name: {}
    limited: bool = False
    expander: PromptExpander = field(default_factory=PromptExpander)
    upscaler: ImageUpscaler = NO_UPSCALER
    detector: DetailDetector = field(default_factory=NoDetector)
    controlnets: ControlNetworks = NO_CONTROLNETS
    preprocessor: ImagePreprocessor = field(default_factory=InProcessPreprocessor)
    image_prompts: ImagePromptAdapters = field(default_factory=ImagePromptFolder)

    def for_caller(self, caller: Caller) -> DialectContext:
        """Return the context with the models that a caller may use, and with no others in lists and sentences."""
        if caller.uses_all_models:
            return self
        models = permitted_models(self.models, caller)
        default = self.default_model if self.default_model in models else next(iter(models), "")
        aliases = {alias: name for alias, name in self.aliases.items() if name in models}
        return replace(self, models=models, default_model=default, aliases=aliases, limited=True)

    def model(self, name: str | None) -> ModelSpec:
        """Return the model of a name or alias; the default model without one.

        Raises `InvalidInput`, or `Forbidden` if the caller may use some models only.
        """
        spec = self.find_model(name)
        if spec is None:
            raise self.refusal(name, InvalidInput)
        return spec

    def refusal(self, name: str | None, usual: type[InvalidInput | NotFound]) -> ServerError:
        """Return the error about a model that is not among these: `usual`, or `Forbidden` for a limited caller."""
        return (Forbidden if self.limited else usual)(self.unknown_model(name), field="model")

    def find_model(self, name: str | None) -> ModelSpec | None:
        """Return the model of a name or alias, the default model without one, `None` for an unknown name.

        Names that start as OpenAI's do are aliases of the default model, because new ones appear every few months.
        """
        own = self.aliases.get(name, name) if name else self.default_model
        if own in self.models:
            return self.models[own]
        if name and name not in self.aliases and not name.startswith(_OPENAI_MODELS):
            return None
        # The first model replaces one that is not loaded.
        return self.models.get(self.default_model) or next(iter(self.models.values()), None)

    def unknown_model(self, name: str | None) -> str:
        """Return the sentence about an unknown model."""
        if self.limited:
            return not_permitted(str(name), self.models)
        known = known_names(str(name), [*sorted(self.models), *self.aliases])
        return f"model {str(name)[:100]!r} does not exist here; {known}."

    def check_size(self, images: int, width: int, height: int, field: str) -> None:
        """Raise `InvalidInput` if a base64 response with these images could exceed `max_response_bytes`.

        A pixel takes at most 3 bytes in a file, and 3 bytes take 4 characters in base64.
        """
        if images * width * height * 4 > self.max_response_bytes:
            raise InvalidInput("The answer would be too large; ask for fewer pictures, or smaller ones.", field=field)
