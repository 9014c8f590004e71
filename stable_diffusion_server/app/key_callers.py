"""The API keys: who each stands for, which models it may use, and how requests are checked for it."""

from __future__ import annotations

from collections.abc import Mapping

import limits as rates

from stable_diffusion_server.api import ApiKeyring, HashedApiKey, hashed
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import Caller


def callers_of_keys(settings: Settings) -> dict[str, Caller]:
    """Return the caller of each API key by the key's name. Names of MODEL_ALIASES stand for the models they lead to."""
    pairs = (entry.partition("=") for entry in settings.model_aliases)
    aliases = {alias: model or settings.text_to_image_model for alias, _, model in pairs}
    return {
        key.name: Caller(key.name, key.prefix, key.admin, models=tuple(aliases.get(name, name) for name in key.models))
        for key in settings.read_keys()
    }


def unknown_models_of_keys(settings: Settings, models: Mapping[str, ModelSpec]) -> list[str]:
    """Return a sentence for each API key that may use models that are not here."""
    pairs = (
        (name, [model for model in caller.models if model not in models])
        for name, caller in callers_of_keys(settings).items()
    )
    return [
        f"The API key {name} may use {', '.join(map(repr, unknown))}, not a model here."
        for name, unknown in pairs
        if unknown
    ]


def build_keyring(settings: Settings) -> ApiKeyring:
    """Return the API keys of the settings with hashed secrets."""
    callers = callers_of_keys(settings)
    return ApiKeyring(
        HashedApiKey(
            callers[key.name],
            hashed(key.secret.get_secret_value()),
            rate_of(key.rate),
            key.concurrency,
        )
        for key in settings.read_keys()
    )


def rate_of(text: str) -> rates.RateLimitItem | None:
    """Return the limit of a text such as `60/minute`; `None` for an empty one."""
    return rates.parse(text) if text else None
