"""Specs of the small stand-ins, and the files beside a bare Flux transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_stand_ins import write
from drawing import MODELS_DIR
from original_names import clip_tensors, t5_tensors, vae_tensors

from stable_diffusion_server.pipelines.catalog import REAL_MODELS
from stable_diffusion_server.pipelines.family_rows import family_row
from stable_diffusion_server.pipelines.library import Kind, ModelTask
from stable_diffusion_server.pipelines.library.identity import FileIdentity
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec

T5_WORDS = MODELS_DIR / "embedded-flux" / "tokenizer_2"


def sdxl_spec(*parts: tuple[str, str], **changes: Any) -> ModelSpec:
    """A spec of SDXL files."""
    given = {key: changes.pop(key) for key in ("prediction", "zero_snr") if key in changes}
    files = CheckpointFiles("sdxl", parts, **given)
    return replace(REAL_MODELS["sdxl"][1], folder=parts[0][1], checkpoint=files, control_folder=None, **changes)


def sd15_spec(*parts: tuple[str, str], task: ModelTask = ModelTask.NORMAL, **given: Any) -> ModelSpec:
    """A spec of files of SD 1.5."""
    row = family_row(FileIdentity(Kind.CHECKPOINT, ("sd15",), task=task))
    assert row is not None
    return replace(row, folder=parts[0][1], checkpoint=CheckpointFiles("sd15", parts, **given))


def flux_spec(*parts: tuple[str, str], tokenizer: str = "words") -> ModelSpec:
    """A spec of Flux files."""
    files = CheckpointFiles("flux", parts, tokenizer=tokenizer)
    return replace(REAL_MODELS["flux"][0], folder=parts[0][1], checkpoint=files, control_folder=None)


def words_in(folder: Path) -> None:
    """T5's tokenizer as the folder `words`."""
    (folder / "words").symlink_to(T5_WORDS)


def split_flux(small: Any, folder: Path, transformer: str, t5: str = "t5xxl.safetensors") -> ModelSpec:
    """Write the parts beside a transformer as ComfyUI splits them."""
    if not (folder / "words").exists():
        words_in(folder)
        write(folder / "ae.safetensors", vae_tensors(small.vae))
        write(folder / "clip_l.safetensors", clip_tensors(small.text_encoder))
        write(folder / "t5xxl.safetensors", t5_tensors(small.text_encoder_2))
    return flux_spec(("denoiser", transformer), ("vae", "ae.safetensors"), ("clip_l", "clip_l.safetensors"), ("t5", t5))
