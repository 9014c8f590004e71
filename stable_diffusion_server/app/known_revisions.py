"""Remembers the final revision of models by their files and settings, so that a stored image is found before a load."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from stable_diffusion_server import __version__
from stable_diffusion_server.app.model_choice import file_stamp
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.types import digest

_log = structlog.get_logger(__name__)

_KEPT, _MAX_BYTES = 4096, 4_000_000
# Fields of a spec that loading decides.
_DECIDED = ("revision", "control_revision", "control_folder", "cpu_dtype", "measured_dtype")
# Settings that decide how a model computes, and so its revision.
_SETTINGS = (
    "device",
    "quantize",
    "offload",
    "cpu_dtype",
    "mmap_weights",
    "df11_model_path",
    "load_lcm_lora",
    "performance",
)
_PACKAGES = ("torch", "diffusers", "transformers")


class KnownRevisions:
    """What loading decided of models, in a file of DATA_DIR, under a key that changes with all that it follows from.

    The key covers the spec, place, inode, size and times of each file, the settings, the machine and the packages. With
    CONTROLNET_LORA nothing is remembered: its file may be anywhere. Not thread-safe.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file = settings.data_dir / "revisions.json"
        self._known: dict[str, dict[str, Any]] = _read(self._file)

    def find(self, asked: ModelSpec) -> ModelSpec | None:
        """Return the spec as the last load of these files made it, still to be loaded; `None` if it is not known."""
        found = self._known.get(self._key_of(asked))
        if found is None or self._settings.controlnet_lora:
            return None
        return replace(asked, **found, unread=True, remembered=True)

    def keep(self, asked: ModelSpec, loaded: ModelSpec) -> None:
        """Remember what loading made of a spec. A file that cannot be written is logged only."""
        key, decided = self._key_of(asked), {name: getattr(loaded, name) for name in _DECIDED}
        if self._known.get(key) == decided or self._settings.controlnet_lora:
            return
        self._known = {**{name: value for name, value in self._known.items() if name != key}, key: decided}
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = self._file.with_suffix(".new")
            new.write_text(json.dumps(dict(list(self._known.items())[-_KEPT:])))
            os.replace(new, self._file)
        except OSError as error:
            _log.warning("revisions of models cannot be kept; the next start loads the models again", why=str(error))

    def _key_of(self, asked: ModelSpec) -> str:
        facts = {
            "spec": repr(asked),
            "files": repr(file_stamp(self._settings, asked)),
            "settings": repr([getattr(self._settings, name) for name in _SETTINGS]),
            "machine": [platform.machine(), platform.node()],
            "packages": [__version__, *(version(name) for name in _PACKAGES)],
        }
        return digest(facts)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return what was kept; nothing from a file that is damaged or too long."""
    try:
        if file.stat().st_size > _MAX_BYTES:
            return {}
        read = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("remembered revisions cannot be read; models are loaded to know them", why=str(error))
        return {}
    kinds = {part.name: part.type for part in fields(ModelSpec) if part.name in _DECIDED}
    known = read.items() if isinstance(read, dict) else ()
    return {str(key): dict(value) for key, value in known if isinstance(value, Mapping) and set(value) == set(kinds)}
