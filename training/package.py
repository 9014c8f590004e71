"""Writes the trained models to models/, in half precision."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FluxControlNetModel,
    FluxPipeline,
    StableDiffusionXLPipeline,
)

from training.loop import RUNS

MODELS = Path(__file__).parent.parent / "models"
PARTS = {
    "sdxl": (
        ("embedded-sdxl", "sdxl", StableDiffusionXLPipeline),
        ("embedded-controlnet-canny-sdxl", "controlnet-sdxl", ControlNetModel),
    ),
    "flux": (
        ("embedded-flux", "flux", FluxPipeline),
        ("embedded-controlnet-canny-flux", "controlnet-flux", FluxControlNetModel),
    ),
}
"""By family: folders under models/ with the stage that makes each and the class that loads it."""
ADAPTERS = {"sdxl": {"outlines": "lora"}, "flux": {}}
"""By family: files in models/loras/ with the stage that makes each."""


def clear(folder: Path) -> None:
    """Remove all files of a model folder, so that no files of an earlier layout remain."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.unlink()
        else:
            path.rmdir()


def tidy(folder: Path) -> None:
    """Remove from configurations the training machine's path, and a ControlNet's inherited option without use."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            continue
        unused = {"_name_or_path"}
        if content.get("_class_name") == "FluxControlNetModel":
            unused.add("out_channels")
        if unused & set(content):
            kept = {name: value for name, value in content.items() if name not in unused}
            path.write_text(json.dumps(kept, indent=2) + "\n")


def run(family: str) -> str:
    """Save a family's finished components under models/ as fp16 safetensors; returns the digest of its weights."""
    for name, stage, kind in PARTS[family]:
        made = RUNS / stage / "out"
        if not made.exists():
            continue
        extra = {}
        if stage == family:
            extra["vae"] = AutoencoderKL.from_pretrained(RUNS / "vae-flux" / "out", dtype=torch.float16)
        loaded = kind.from_pretrained(made, dtype=torch.float16, **extra)
        clear(MODELS / name)
        loaded.save_pretrained(MODELS / name, safe_serialization=True)
        tidy(MODELS / name)
    for name, stage in ADAPTERS[family].items():
        made = RUNS / stage / "out" / "pytorch_lora_weights.safetensors"
        if made.exists():
            (MODELS / "loras").mkdir(exist_ok=True)
            shutil.copyfile(made, MODELS / "loras" / f"{name}.safetensors")
    return digest(MODELS / PARTS[family][0][0])


def run_upscaler() -> str:
    """Copy the finished upscaler to models/; returns the digest of its folder."""
    folder = MODELS / "embedded-upscaler"
    folder.mkdir(exist_ok=True)
    for made in (RUNS / "upscaler" / "out").glob("*.safetensors"):
        shutil.copyfile(made, folder / made.name)
    return digest(folder)


def digest(folder: Path) -> str:
    """Return the first ten digits of the SHA-256 of a model's file names and contents: the catalogue's revision."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return content.hexdigest()[:10]
