"""Models to be fetched: what they are by their first bytes, where they belong, and the pin of their origin."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePath

from stable_diffusion_server.pipelines.library.file_headers import MAX_HEADER_BYTES
from stable_diffusion_server.pipelines.library.identification import GGUF, SAFETENSORS, identify_file
from stable_diffusion_server.pipelines.library.identity import FileIdentity, Kind
from stable_diffusion_server.pipelines.library.spec_file import SUFFIX, spec_path

# The folders of ComfyUI and AUTOMATIC1111 for each kind, in small letters.
_FOLDERS: Mapping[Kind, tuple[str, ...]] = {
    Kind.CHECKPOINT: ("checkpoints", "stable-diffusion"),
    Kind.DENOISER: ("diffusion_models", "unet"),
    Kind.VAE: ("vae",),
    Kind.TINY_VAE: ("vae_approx", "vae-approx"),
    Kind.TEXT_ENCODER: ("text_encoders", "clip"),
    Kind.IMAGE_ENCODER: ("clip_vision",),
    Kind.LORA: ("loras", "lora", "lycoris"),
    Kind.EMBEDDING: ("embeddings",),
    Kind.CONTROLNET: ("controlnet",),
    Kind.CONTROL_LORA: ("controlnet",),
    Kind.IMAGE_PROMPT: ("ipadapter", "style_models"),
    Kind.UPSCALER: ("upscale_models", "esrgan", "realesrgan"),
}
_FIRST_BYTES, _SHORTEST = 65_536, 10
# GGUF does not say how long its header is: under 1 MB, with a large vocabulary 6.
_GGUF_BYTES, _MOST_GGUF_BYTES, _SOME_SIZE = 2**20, 8 * 2**20, 2**40
# Ends the lines that `pin_origin` wrote: it replaces these and no other.
_MARK = "  # models fetch"


def header_size(name: str, beginning: bytes) -> int:
    """How many bytes from its start tell what a file of this name is, as far as `beginning` says."""
    if name.lower().endswith(GGUF):
        known = len(beginning) >= _GGUF_BYTES and not identify_beginning(name, beginning, _SOME_SIZE).reason
        return _GGUF_BYTES if known or len(beginning) < _GGUF_BYTES else _MOST_GGUF_BYTES
    if len(beginning) < _SHORTEST:
        return _FIRST_BYTES
    length = int.from_bytes(beginning[:8], "little")
    return 8 + length if length <= MAX_HEADER_BYTES and beginning[8:9] == b"{" else len(beginning)


def identify_beginning(name: str, beginning: bytes, size: int) -> FileIdentity:
    """What a file of this name and size is that begins so. Its weights are not needed."""
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        file = Path(folder, "file").with_suffix(PurePath(name).suffix)
        file.write_bytes(beginning[:size])
        os.truncate(file, size)  # the rest is a hole
        return identify_file(file)


def folder_for(kind: Kind, models_dir: Path) -> Path:
    """The folder of `models_dir` for models of a kind: ComfyUI's or AUTOMATIC1111's if it is there, else itself."""
    try:
        there = {entry.name.lower(): entry for entry in sorted(models_dir.iterdir()) if entry.is_dir()}
    except OSError:
        return models_dir
    return next((there[name] for name in _FOLDERS.get(kind, ()) if name in there), models_dir)


def pin_origin(model: Path, origin: Mapping[str, str]) -> tuple[Path, tuple[str, ...]]:
    """Write `source`, `revision` and the like into the spec beside a model; returns it, and the keys left alone.

    A new spec is made if there is none. What the owner wrote is left alone, and all of it if it is not TOML. Raises
    `OSError`.
    """
    spec = Path(os.path.realpath(spec_path(model) or _new_spec(model)))
    lines = spec.read_text(encoding="utf-8", errors="replace").splitlines() if spec.exists() else []
    kept = [line for line in lines if not (line.endswith(_MARK) and line.partition(" ")[0] in origin)]
    try:
        owned = tomllib.loads("\n".join(kept))
    except tomllib.TOMLDecodeError:
        return spec, tuple(origin)
    ours = [
        f"{name} = {json.dumps(text, ensure_ascii=False)}{_MARK}"
        for name, text in origin.items()
        if text and name not in owned
    ]
    new = spec.with_name(f".{spec.name}.new")
    # Above the owner's lines, because keys below a table's heading would belong to the table.
    new.write_text("".join(f"{line}\n" for line in (*ours, *kept)), encoding="utf-8")
    if spec.exists():
        shutil.copymode(spec, new)
    os.replace(new, spec)
    return spec, tuple(name for name, text in origin.items() if text and owned.get(name, text) != text)


def _new_spec(model: Path) -> Path:
    """`NAME.toml`, or `NAME.ending.toml` if the first would be the spec of another file too."""
    if model.is_dir():
        return model.with_name(model.name + SUFFIX)
    others = (model.with_suffix(ending) for ending in (SAFETENSORS, GGUF) if ending != model.suffix)
    return model.with_name(model.name + SUFFIX) if any(map(os.path.lexists, others)) else model.with_suffix(SUFFIX)
