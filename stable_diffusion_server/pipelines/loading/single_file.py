"""Loads a pipeline from files as people download them: one checkpoint, or a denoiser with its parts beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.loading.checkpoint_configs import (
    base_configs,
    clip_config,
    t5_config,
    transformer_config,
    unet_config,
    vae_config,
)
from stable_diffusion_server.pipelines.loading.checkpoint_layout import CLIP_G, CLIP_L, DENOISER, T5, VAE, split_parts
from stable_diffusion_server.pipelines.loading.checkpoint_names import (
    clip_g_names,
    t5_names,
    transformer_names,
    unet_names,
    vae_names,
)
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import Tensors, read_tensors, shapes_of
from stable_diffusion_server.pipelines.loading.compatibility import check_pipeline
from stable_diffusion_server.pipelines.loading.model_files import translate_load_errors
from stable_diffusion_server.pipelines.loading.network_assembly import assemble
from stable_diffusion_server.pipelines.loading.packed_weights import PackedWeight
from stable_diffusion_server.pipelines.loading.tokenizer_files import clip_tokenizer, t5_tokenizer
from stable_diffusion_server.pipelines.loading.weight_digest import ignore_progress
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles, ModelSpec

# Family → part → component of the pipeline.
COMPONENTS: Mapping[str, Mapping[str, str]] = {
    "sdxl": {DENOISER: "unet", VAE: "vae", CLIP_L: "text_encoder", CLIP_G: "text_encoder_2"},
    "flux": {DENOISER: "transformer", VAE: "vae", CLIP_L: "text_encoder", T5: "text_encoder_2"},
}
_SHOWN = {DENOISER: "denoiser", VAE: "VAE", CLIP_L: "CLIP-L", CLIP_G: "CLIP-G", T5: "T5"}


def load_checkpoint(
    spec: ModelSpec, models_dir: Path, dtype: torch.dtype, report: Callable[[float], None] = ignore_progress
) -> Any:
    """The pipeline of the files in `spec.checkpoint`, with its weights in `dtype`, on the CPU. Opens no socket.

    Float8 and GGUF weights of the denoiser stay packed. `report` receives the share of the components that is loaded.
    Raises `ModelLoadError`.
    """
    files = _files(spec)
    with translate_load_errors(spec.folder, models_dir):
        parts = _networks(files, models_dir, dtype, report, meta=False)
        pipeline = _PIPELINES[files.family](spec, files, models_dir, parts)
        check_pipeline(spec.folder, pipeline)
        if pipeline.vae.config.force_upcast and dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # SDXL's VAE overflows in fp16
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def empty_checkpoint(spec: ModelSpec, models_dir: Path) -> dict[str, torch.nn.Module]:
    """The components that `load_checkpoint` makes, by name, without weights (on torch's meta device)."""
    with translate_load_errors(spec.folder, models_dir):
        return _networks(_files(spec), models_dir, torch.float32, ignore_progress, meta=True)


def checkpoint_files(spec: ModelSpec, models_dir: Path) -> dict[str, Path]:
    """The files that determine the model's images, by the part they are used for."""
    files: dict[str, Path] = {}
    for part, name in _files(spec).parts:
        place = models_dir / name
        inside = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
        files.update({f"{part}/{file.name}" if place.is_dir() else part: file for file in inside})
    return files


def _files(spec: ModelSpec) -> CheckpointFiles:
    if spec.checkpoint is None:
        raise ModelLoadError(f"{spec.name} is not a model of single files.")
    return spec.checkpoint


def _networks(
    files: CheckpointFiles, models_dir: Path, dtype: torch.dtype, report: Callable[[float], None], *, meta: bool
) -> dict[str, Any]:
    """The networks by component name. A file that holds several parts is read once."""
    places = dict(files.parts)

    @functools.cache
    def read(name: str) -> dict[str, Tensors]:
        return split_parts(read_tensors(models_dir / name, meta=meta))

    networks: dict[str, Any] = {}
    for part, component in COMPONENTS[files.family].items():
        place = places.get(part, places[DENOISER])
        tensors = read(place).get(part)
        if tensors is None:
            raise WeightFileError(f"{Path(place).name} holds no {_SHOWN[part]}")
        try:
            networks[component] = _network(files.family, part, component, tensors, dtype)
        except WeightFileError as error:
            raise WeightFileError(f"the {_SHOWN[part]} in {Path(place).name} cannot be used: {error}") from error
        report(len(networks) / len(COMPONENTS[files.family]))
    return networks


def _network(family: str, part: str, component: str, tensors: Tensors, dtype: torch.dtype) -> Any:
    if part == DENOISER:
        shapes = shapes_of(tensors)
        if family == "sdxl":
            config = unet_config(shapes)
            return assemble(
                diffusers.UNet2DConditionModel, config, unet_names(tensors, config), dtype, keep_packed=True
            )
        config = transformer_config(shapes)
        return assemble(diffusers.FluxTransformer2DModel, config, transformer_names(tensors), dtype, keep_packed=True)
    if part == T5:
        named = t5_names(tensors)
        return assemble(transformers.T5EncoderModel, t5_config(shapes_of(named)), named, dtype)
    plain = {
        name: tensor.unpack(dtype) if isinstance(tensor, PackedWeight) else tensor for name, tensor in tensors.items()
    }
    if part == VAE:
        config = vae_config(shapes_of(plain), family)
        return assemble(diffusers.AutoencoderKL, config, vae_names(plain, config), dtype)
    named = clip_g_names(plain) if part == CLIP_G else dict(plain)
    network_class = transformers.CLIPTextModelWithProjection if part == CLIP_G else transformers.CLIPTextModel
    return assemble(network_class, clip_config(shapes_of(named), family, component), named, dtype)


def _sdxl(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    config = dict(base_configs("sdxl")["scheduler"])
    if files.prediction:
        config["prediction_type"] = files.prediction
    if files.zero_snr:
        # Lin et al. 2023 (arXiv 2305.08891): the last step starts from pure noise, so the schedule must begin there.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    # Without `add_watermarker`, the pipeline would mark images wherever the package invisible-watermark is installed.
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(config),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _flux(spec: ModelSpec, files: CheckpointFiles, models_dir: Path, parts: Mapping[str, Any]) -> Any:
    configs = base_configs("flux")
    guided = parts["transformer"].config.guidance_embeds
    return getattr(diffusers, spec.pipeline_class)(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(models_dir / files.tokenizer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            configs["scheduler" if guided else "scheduler_schnell"]
        ),
    )


_PIPELINES: Mapping[str, Callable[[ModelSpec, CheckpointFiles, Path, Mapping[str, Any]], Any]] = {
    "sdxl": _sdxl,
    "flux": _flux,
}
