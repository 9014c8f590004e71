"""What the doors of other dialects know of the server they stand in. Knows no requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.generation import RequestLimits
from stable_diffusion_server.pipelines import ModelSpec


@dataclass(frozen=True, slots=True)
class DialectContext:
    """What the dialects' doors know of the server: bounds, models by name, further names of them, and adapters."""

    limits: RequestLimits
    models: Mapping[str, ModelSpec]
    default_model: str
    aliases: Mapping[str, str]
    max_n: int
    max_response_bytes: int
    loras: Callable[[], Iterable[str]] = tuple

    def facts(self, name: str | None) -> ModelSpec:
        """The facts of a model by its own name or another server's. Raises `InvalidInput`."""
        own = self.aliases.get(name, name) if name else self.default_model
        if own not in self.models and (name is None or name in self.aliases):
            own = next(iter(self.models))  # this family has no weights here
        if own not in self.models:
            known = ", ".join([*sorted(self.models), *self.aliases])
            raise InvalidInput(f"{str(name)[:100]!r} is not a model here; there are {known}.", field="model")
        return self.models[own]

    def check_size(self, pictures: int, width: int, height: int, field: str) -> None:
        """Raise `InvalidInput` for pictures that would make an answer in base64 too large.

        A pixel has three bytes at the most, and three bytes four characters.
        """
        if pictures * width * height * 4 > self.max_response_bytes:
            raise InvalidInput("The answer would be too large; ask for fewer pictures, or smaller ones.", field=field)
