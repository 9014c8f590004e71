"""Server data for the OpenAI and AUTOMATIC1111 routes: limits, models, aliases and LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.pipelines import ModelSpec


@dataclass(frozen=True, slots=True)
class DialectContext:
    """Limits, models by name, their aliases, and the names of the LoRAs.

    `max_n` is the maximum number of images per request, `max_response_bytes` that of bytes of base64 per response.
    """

    limits: RequestLimits
    models: Mapping[str, ModelSpec]
    default_model: str
    aliases: Mapping[str, str]
    max_n: int
    max_response_bytes: int
    loras: Callable[[], Iterable[str]] = tuple

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
