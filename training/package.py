"""Puts what the stages made into models/, in half precision; knows formats, nothing of training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxPipeline,
    StableDiffusionXLPipeline,
)

from training.loop import RUNS

MODELS = Path(__file__).parent.parent / "models"
PARTS = {
    "embedded-sdxl": ("sdxl", StableDiffusionXLPipeline),
    "embedded-flux": ("flux", FluxPipeline),
    "embedded-controlnet-canny-sdxl": ("controlnet-sdxl", ControlNetModel),
    "embedded-controlnet-canny-flux": ("controlnet-flux", FluxControlNetModel),
}
"""Folder under models/ with the stage that makes it and the class that loads it."""


def clear(folder: Path) -> None:
    """Remove a model folder's files, so that none of an earlier layout stays."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()
        else:
            path.rmdir()


def forget_origin(folder: Path) -> None:
    """Drop the path that diffusers notes in configurations: it names the machine that trained."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")


def run(names: tuple[str, ...] = tuple(PARTS)) -> None:
    """Save every finished part under models/ as fp16 safetensors."""
    for name in names:
        stage, kind = PARTS[name]
        made = RUNS / stage / "out"
        if not made.exists():
            continue
        loaded = kind.from_pretrained(made, dtype=torch.float16)
        clear(MODELS / name)
        loaded.save_pretrained(MODELS / name, safe_serialization=True)
        forget_origin(MODELS / name)


def digests() -> dict[str, str]:
    """Return the SHA-256 of every weight file, by its path under models/."""
    files = sorted(MODELS.glob("embedded-*/**/*.safetensors"))
    return {str(path.relative_to(MODELS)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
