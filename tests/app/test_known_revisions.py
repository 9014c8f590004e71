"""What loading decided of a model is remembered by its files and settings, and by nothing less."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import settings_in

from stable_diffusion_server.app.known_revisions import KnownRevisions
from stable_diffusion_server.pipelines import MODELS
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec
from stable_diffusion_server.settings import Settings

PARTS = ("denoiser", "vae")


@pytest.fixture
def asked(tmp_path: Path) -> ModelSpec:
    """A model of two files, as it is asked for."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for part in PARTS:
        (weights / f"{part}.safetensors").write_bytes(part.encode())
    files = CheckpointFiles("sdxl", tuple((part, f"{part}.safetensors") for part in PARTS))
    return replace(MODELS["sdxl"], name="mine", folder="denoiser.safetensors", checkpoint=files, control_folder=None)


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return settings_in(tmp_path, models_dir=tmp_path / "weights", **changes)


def test_what_was_kept_is_found_by_the_next_process(asked: ModelSpec, tmp_path: Path) -> None:
    """Revision and dtype are those of the load; the model is still to be loaded."""
    loaded = replace(asked, revision="sdxl-0123", cpu_dtype="bfloat16", measured_dtype=False)
    KnownRevisions(settings(tmp_path)).keep(asked, loaded)
    found = KnownRevisions(settings(tmp_path)).find(asked)
    assert found == replace(loaded, unread=True, remembered=True)


def _rewritten(tmp_path: Path) -> None:
    file = tmp_path / "weights" / "vae.safetensors"
    times = file.stat()
    file.write_bytes(b"VAE")  # as long as before
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_other_files_settings_or_specs_are_not_known(asked: ModelSpec, tmp_path: Path) -> None:
    """A file of the same length and time, another setting, another spec: each has to be loaded."""
    known = KnownRevisions(settings(tmp_path))
    known.keep(asked, replace(asked, revision="sdxl-0123"))
    assert known.find(asked) is not None
    assert known.find(replace(asked, clip_skip=1)) is None
    for changes in ({"quantize": "int8"}, {"device": "cpu"}, {"mmap_weights": True}, {"controlnet_lora": "edges"}):
        assert KnownRevisions(settings(tmp_path, **changes)).find(asked) is None, changes
    _rewritten(tmp_path)
    assert known.find(asked) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"key": 1}', '{"key": {"revision": "x"}}', "[" * 100_000])
def test_a_damaged_file_is_as_none(asked: ModelSpec, tmp_path: Path, text: str) -> None:
    """Nothing is known then, and it is written anew."""
    file = settings(tmp_path).data_dir / "revisions.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    known = KnownRevisions(settings(tmp_path))
    assert known.find(asked) is None
    known.keep(asked, replace(asked, revision="sdxl-0123"))
    assert len(json.loads(file.read_text())) == 1
