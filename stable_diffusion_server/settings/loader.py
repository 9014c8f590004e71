"""Reads the environment and tells what may be set there, in sentences and as a table."""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError

from stable_diffusion_server.settings.models import ROOT
from stable_diffusion_server.settings.server import Settings


class SettingsError(Exception):
    """A setting is misspelt or invalid. The message is one sentence naming it, and never holds a secret value."""


def read_settings() -> Settings:
    """The settings from the environment and `.env`. Raises `SettingsError` with one sentence for the first fault."""
    known = set(Settings.model_fields)
    for name in {**os.environ, **dotenv_values(".env")}:
        if (meant := _misspelt(name.lower(), known)) is not None:
            raise SettingsError(f"{name} is not a setting; {meant.upper()} may be meant (unset or rename it).")
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        # from None: the chained error would show the values, and one of them may be a key.
        raise SettingsError(f"{name} {message}.".strip()) from None


def describe_settings() -> str:
    """The settings as a Markdown table: name, default, meaning."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = None if field.default == SecretStr("") else field.default
        if isinstance(default, Path) and default.is_relative_to(ROOT):
            default = default.relative_to(ROOT)
        if default and isinstance(default, tuple):
            default = ", ".join(map(str, default))
        shown = (
            {"": "(empty)", (): "(empty)", None: "(empty)", True: "1", False: "0"}.get(default, default)
            if (_plain(default))
            else default
        )
        rows.append(f"| `{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def _plain(default: object) -> bool:
    return default is None or isinstance(default, str | tuple | bool)


def _misspelt(name: str, known: set[str]) -> str | None:
    """The setting that `name` is one typing error away from, when it is none itself. Short names are let be."""
    if name in known:
        return None
    return next((setting for setting in sorted(known) if len(setting) > 6 and _one_slip(name, setting)), None)


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less, other, or two swapped turn `a` into `b`."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    return (
        rest_a[1:] == rest_b[1:]
        or rest_a == rest_b[1:]
        or rest_a[1:] == rest_b
        or (rest_a[:2] == rest_b[1::-1] and rest_a[2:] == rest_b[2:])
    )
