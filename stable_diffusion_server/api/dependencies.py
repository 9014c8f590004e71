"""What routes depend on: the caller and the caller's part of the bucket; limits and models for the dialects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from fastapi import Request

from stable_diffusion_server.errors import Forbidden, InvalidInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import Caller, GenerationRequest

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


@dataclass(frozen=True, slots=True)
class DialectContext:
    """Limits, models by name, their aliases, and the names of the LoRAs.

    `max_n` is the maximum number of images per request, `max_response_bytes` that of bytes of base64 per response.
    `device_memory` returns bytes by device and kind.
    """

    limits: RequestLimits
    models: Mapping[str, ModelSpec]
    default_model: str
    aliases: Mapping[str, str]
    max_n: int
    max_response_bytes: int
    loras: Callable[[], Iterable[str]] = tuple
    device_memory: Callable[[], Mapping[str, Mapping[str, int]]] = dict

    def model(self, name: str | None) -> ModelSpec:
        """Return the model of a name or alias; the default model without one. Raises `InvalidInput`."""
        own = self.aliases.get(name, name) if name else self.default_model
        if own not in self.models and (name is None or name in self.aliases):
            own = next(iter(self.models))  # an alias of a model that is not loaded
        if own not in self.models:
            known = ", ".join([*sorted(self.models), *self.aliases])
            raise InvalidInput(f"{str(name)[:100]!r} is not a model here; there are {known}.", field="model")
        return self.models[own]

    def check_size(self, images: int, width: int, height: int, field: str) -> None:
        """Raise `InvalidInput` if a base64 response with these images could exceed `max_response_bytes`.

        A pixel takes at most 3 bytes in a file, and 3 bytes take 4 characters in base64.
        """
        if images * width * height * 4 > self.max_response_bytes:
            raise InvalidInput("The answer would be too large; ask for fewer pictures, or smaller ones.", field=field)
