"""Loads a pipeline from files as people download them: one checkpoint, or a denoiser with its parts beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.checkpoint_configs import base_configs
from stable_diffusion_server.pipelines.loading.checkpoint_layout import CLIP_G, CLIP_L
from stable_diffusion_server.pipelines.loading.compatibility import check_pipeline
from stable_diffusion_server.pipelines.loading.model_files import translate_load_errors
from stable_diffusion_server.pipelines.loading.packed_weights import UNPACKED, WeightStorage
from stable_diffusion_server.pipelines.loading.part_networks import files_of_place, networks_of
from stable_diffusion_server.pipelines.loading.tokenizer_files import (
    clip_tokenizer_of,
    qwen3_tokenizer,
    t5_tokenizer,
    tokenizer_beside,
)
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.loading.weight_files import texts_in
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec


def load_checkpoint(
    spec: ModelSpec,
    models_dir: Path,
    dtype: torch.dtype,
    report: Callable[[float], None] = ignore_progress,
    storage: WeightStorage = UNPACKED,
) -> Any:
    """The pipeline of the files in `spec.checkpoint`, with its weights in `dtype`, on the CPU. Opens no socket.

    Float8 and GGUF weights of the denoiser stay packed, others as `storage` says. `report` receives the share of the
    components that is loaded. Raises `ModelLoadError`.
    """
    files = _files(spec)
    with translate_load_errors(spec.folder, models_dir):
        parts = networks_of(files, models_dir, spec.variant, dtype, report, storage, meta=False)
        pipeline = _PIPELINES[files.family](spec, files, models_dir, parts)
        check_pipeline(spec.folder, pipeline)
        if pipeline.vae.config.get("force_upcast") and dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # SDXL's VAE overflows in fp16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def empty_checkpoint(
    spec: ModelSpec, models_dir: Path, storage: WeightStorage = UNPACKED
) -> dict[str, torch.nn.Module]:
    """The components that `load_checkpoint` makes, by name, without weights (on torch's meta device)."""
    with translate_load_errors(spec.folder, models_dir):
        return networks_of(_files(spec), models_dir, spec.variant, torch.float32, ignore_progress, storage, meta=True)


def checkpoint_files(spec: ModelSpec, models_dir: Path) -> dict[str, Path]:
    """The files that determine the model's images, by what they are used for. Raises `ModelLoadError`."""
    files, found = _files(spec), dict[str, Path]()
    with translate_load_errors(spec.folder, models_dir):
        for part, name in files.parts:
            place = models_dir / name
            inside = files_of_place(place, part, spec.variant)
            found |= {part: place} if inside == [place] else {f"{part}/{file.name}": file for file in inside}
        for folder in _tokenizer_folders(files, models_dir):
            found |= {f"{folder.name}/{file.name}": file for file in texts_in(folder)}
    return found


def _files(spec: ModelSpec) -> CheckpointFiles:
    if spec.checkpoint is None:
        raise ModelLoadError(f"{spec.name} is not a model of single files.")
    return spec.checkpoint


def _tokenizer_folders(files: CheckpointFiles, models_dir: Path) -> list[Path]:
    """The folders that tokenizers are read from."""
    beside = [tokenizer_beside(models_dir / name) for _, name in files.parts]
    given = [models_dir / files.tokenizer] if files.tokenizer else []
    return [folder for folder in dict.fromkeys([*beside, *given]) if folder is not None and folder.is_dir()]


def _place(files: CheckpointFiles, models_dir: Path, part: str) -> Path:
    return models_dir / dict(files.parts).get(part, "")


def _sdxl(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    config = _as_predicted(dict(base_configs("sdxl")["scheduler"]), files)
    # Without `add_watermarker`, the pipeline would mark images wherever the package invisible-watermark is installed.
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=clip_tokenizer_of(_place(files, models_dir, CLIP_L)),
        tokenizer_2=clip_tokenizer_of(_place(files, models_dir, CLIP_G), pad="!"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(config),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _sd15(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    config = dict(base_configs("sd15")["scheduler"])
    scheduler = diffusers.EulerDiscreteScheduler if files.zero_snr else diffusers.PNDMScheduler
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=clip_tokenizer_of(_place(files, models_dir, CLIP_L)),
        scheduler=scheduler.from_config(_as_predicted(config, files)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _as_predicted(config: dict[str, Any], files: CheckpointFiles) -> dict[str, Any]:
    """A scheduler's configuration with what the files say of the UNet's training."""
    if files.prediction:
        config["prediction_type"] = files.prediction
    if files.zero_snr:
        # Lin et al. 2023 (arXiv 2305.08891): the last step starts from pure noise, so the schedule must begin there.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _flux(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    configs = base_configs("flux")
    guided = parts["transformer"].config.guidance_embeds
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=clip_tokenizer_of(_place(files, models_dir, CLIP_L)),
        tokenizer_2=t5_tokenizer(models_dir / files.tokenizer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            configs["scheduler" if guided else "scheduler_schnell"]
        ),
    )


def _klein(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=qwen3_tokenizer(models_dir / files.tokenizer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(base_configs("flux")["scheduler"]),
        is_distilled=not spec.takes_guidance,
    )


def _z_image(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    config = base_configs("z-image")["scheduler" if spec.takes_guidance else "scheduler_turbo"]
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=qwen3_tokenizer(models_dir / files.tokenizer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(config),
    )


_PIPELINES: Mapping[str, Callable[[ModelSpec, CheckpointFiles, Path, Mapping[str, Any]], Any]] = {
    "sdxl": _sdxl,
    "sd15": _sd15,
    "flux": _flux,
    "flux2": _klein,
    "z-image": _z_image,
}
