"""Reads the settings from the environment and `.env`, and lists them as a Markdown table."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError

from stable_diffusion_server.settings.models import ROOT
from stable_diffusion_server.settings.server import GROUPS, Settings

_SHORT = 6

# Names that settings had before the first release, and their present ones.
RENAMED = {
    "KNOWN_KEYS": "EXISTENCE_CACHE_SIZE",
    "KNOWN_SECONDS": "EXISTENCE_CACHE_TTL",
    "LANES": "ENGINE_WORKERS",
    "JOBS_WAITING": "JOBS_MAX_QUEUED",
    "JOBS_AT_ONCE": "JOBS_CONCURRENCY",
    "STOP_SECONDS": "SHUTDOWN_GRACE_SECONDS",
    "HANG_SECONDS": "WATCHDOG_TIMEOUT",
    "WARM_SIZES": "WARMUP_SIZES",
    "FOLLOWERS": "EVENT_STREAMS",
    "FOLLOWERS_PER_CALLER": "EVENT_STREAMS_PER_CALLER",
    "FOLLOWERS_PER_JOB": "EVENT_STREAMS_PER_JOB",
    "JOURNAL_BYTES": "JOB_STORE_BYTES",
    "JOB_HOURS": "JOB_RETENTION_HOURS",
    "BUMPY_REDRAWS": "BUMPY_RETRIES",
    "UI_EVENTS": "UI_RATE_LIMIT",
}


class SettingsError(Exception):
    """A setting is misspelt, renamed or invalid. The message is one sentence with its name and without secrets."""


def read_settings() -> Settings:
    """Read the settings from the environment and `.env`. Raises `SettingsError` for the first mistake found."""
    known = set(Settings.model_fields)
    for name in {**os.environ, **dotenv_values(".env")}:
        _check_name(name, known)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]).upper() if first["loc"] else ""
        # from None: the chained error would show the values, and one of them may be an API key.
        raise SettingsError(f"{name} {message}.".strip()) from None


def describe_settings() -> str:
    """Return the settings as a Markdown table: name, default, meaning."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for group in GROUPS:
        for name, field in group.model_fields.items():
            rows.append(f"| `{name.upper()}` | {_shown(field.default)} | {field.description} |")
    return "\n".join(rows)


def _shown(default: Any) -> str:
    """Return a default as the table shows it: as it would be written in the environment."""
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if isinstance(default, tuple):
        default = ", ".join(_shown(part) for part in default)
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        default = default.relative_to(ROOT)
    return "(empty)" if default in ("", None) else str(default)


def _check_name(name: str, known: set[str]) -> None:
    """Raise `SettingsError` if the variable is a renamed setting, or a setting's name with one typing error."""
    if (new := RENAMED.get(name.upper())) is not None:
        raise SettingsError(f"{name} is now called {new}: rename it.")
    if (meant := _misspelt(name.lower(), known)) is not None:
        raise SettingsError(f"{name} is not a setting; {meant.upper()} may be meant (unset or rename it).")


def _misspelt(name: str, known: set[str]) -> str | None:
    """Return the setting that `name` is a typing error away from; None for a setting itself.

    Settings of up to six letters are not suggested: too many variables of other programs resemble them.
    """
    if len(name) < _SHORT or name in known:
        return None
    # One letter replaced, or two swapped, leave all but one in common; a missing or an extra letter leaves more.
    close = get_close_matches(
        name, [setting for setting in sorted(known) if len(setting) > _SHORT], n=1, cutoff=(len(name) - 1) / len(name)
    )
    return close[0] if close else None


def configure_gradio(folder: Path) -> None:
    """Make Gradio keep its files in `folder` and send no analytics. Call before Gradio is imported."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def set_compiler_cache(folder: Path) -> None:
    """Make PyTorch's compiler cache its output in `folder` for the next start, unless the user chose a folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
