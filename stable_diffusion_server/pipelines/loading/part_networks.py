"""Builds the networks of a model from the files or folders that its parts are in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.library.shards import index_ending, shards_of
from stable_diffusion_server.pipelines.loading.checkpoint_configs import (
    clip_config,
    t5_config,
    transformer_config,
    unet_config,
    vae_config,
)
from stable_diffusion_server.pipelines.loading.checkpoint_layout import (
    CLIP_G,
    CLIP_L,
    COMPONENTS,
    DENOISER,
    QWEN3,
    T5,
    VAE,
    has_diffusers_names,
    split_parts,
)
from stable_diffusion_server.pipelines.loading.checkpoint_names import (
    clip_g_names,
    renewed_vae_names,
    t5_names,
    transformer_names,
    unet_names,
    vae_names,
)
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import Tensors, forget_pages, read_tensors, shapes_of
from stable_diffusion_server.pipelines.loading.diffusers_configs import (
    diffusers_transformer_config,
    diffusers_unet_config,
    diffusers_vae_config,
)
from stable_diffusion_server.pipelines.loading.network_assembly import assemble
from stable_diffusion_server.pipelines.loading.packed_weights import UNPACKED, PackedWeight, WeightStorage
from stable_diffusion_server.pipelines.loading.qwen3_configs import klein_config, qwen3_config, z_image_config
from stable_diffusion_server.pipelines.loading.qwen3_names import klein_names, klein_vae, qwen3_names, z_image_names
from stable_diffusion_server.pipelines.loading.weight_files import (
    DIFFUSERS,
    SAFETENSORS,
    TRANSFORMERS,
    WeightFileError,
    check_part,
    files_of_part,
    read_json,
    shown,
)
from stable_diffusion_server.pipelines.model_spec import CheckpointFiles

_SHOWN = {DENOISER: "denoiser", VAE: "VAE", CLIP_L: "CLIP-L", CLIP_G: "CLIP-G", T5: "T5", QWEN3: "Qwen3"}
# The families that read Qwen3.
_OF_QWEN3 = ("flux2", "z-image")
_CLASSES: Mapping[tuple[str, str], Any] = {
    ("sdxl", DENOISER): diffusers.UNet2DConditionModel,
    ("sd15", DENOISER): diffusers.UNet2DConditionModel,
    ("flux", DENOISER): diffusers.FluxTransformer2DModel,
    **{(family, VAE): diffusers.AutoencoderKL for family in COMPONENTS},
    **{(family, CLIP_L): transformers.CLIPTextModel for family in COMPONENTS},
    ("sdxl", CLIP_G): transformers.CLIPTextModelWithProjection,
    ("flux", T5): transformers.T5EncoderModel,
    ("flux2", DENOISER): diffusers.Flux2Transformer2DModel,
    ("flux2", VAE): diffusers.AutoencoderKLFlux2,
    ("z-image", DENOISER): diffusers.ZImageTransformer2DModel,
    **{(family, QWEN3): transformers.Qwen3Model for family in _OF_QWEN3},
}


class _Recipe(NamedTuple):
    """The configuration of a network and its tensors by the network's own names."""

    config: Mapping[str, Any]
    tensors: Tensors


def networks_of(
    files: CheckpointFiles,
    models_dir: Path,
    variant: str | None,
    dtype: torch.dtype,
    report: Callable[[float], None],
    storage: WeightStorage = UNPACKED,
    *,
    meta: bool,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """The networks by component name, with `meta` without weights, or `only` those of some parts.

    A file that holds several parts is read once. Of a folder the weights of `variant` are read if it has them.
    `storage` says what is packed of the denoiser and of CLIP. Raises `WeightFileError`.
    """
    places = dict(files.parts)

    @functools.cache
    def read(name: str) -> dict[str, Tensors]:
        return split_parts(read_tensors(*_weights_in(models_dir / name), meta=meta))

    networks: dict[str, Any] = {}
    components = {part: name for part, name in COMPONENTS[files.family].items() if not only or part in only}
    for part, component in components.items():
        place, network_class = places.get(part, places[DENOISER]), _CLASSES[files.family, part]
        is_folder = (models_dir / place).is_dir()
        tensors = None if is_folder else read(place).get(part)
        if tensors is None and not is_folder:
            raise WeightFileError(f"{Path(place).name} holds no {_SHOWN[part]}")
        try:
            mapped = [] if meta else files_of_place(models_dir / place, part, variant)
            if tensors is None:
                recipe = _recipe_of_folder(models_dir / place, network_class, part, variant, meta=meta)
            else:
                recipe = _recipe(files.family, part, component, tensors, dtype)
            networks[component] = assemble(
                network_class,
                *recipe,
                dtype,
                keep_packed=part == DENOISER,
                pack=storage.packing(component, dtype) if part in (DENOISER, CLIP_L, CLIP_G) else None,
                release=functools.partial(_forget, mapped),
            )
        except WeightFileError as error:
            raise WeightFileError(f"the {_SHOWN[part]} in {Path(place).name} cannot be used: {error}") from error
        report(len(networks) / len(components))
    return networks


def _forget(files: list[Path]) -> None:
    for file in files:
        forget_pages(file)


def files_of_place(place: Path, part: str, variant: str | None) -> list[Path]:
    """The files that a part is read from, configurations included. Raises `WeightFileError`."""
    if place.is_dir():
        return files_of_part(place, _stem(part), variant)
    return [place, *(_weights_in(place) if index_ending(place.name) else ())]


def _weights_in(place: Path) -> list[Path]:
    """The files with tensors: the file itself, or the shards that an index lists."""
    if not index_ending(place.name):
        return [place]
    try:
        return shards_of(place)
    except UnreadableModel as error:
        raise WeightFileError(f"{shown(place)} {error}") from error


def _stem(part: str) -> str:
    return DIFFUSERS if part in (DENOISER, VAE) else TRANSFORMERS


def _recipe_of_folder(place: Path, network_class: Any, part: str, variant: str | None, *, meta: bool) -> _Recipe:
    """The recipe of a folder with a config.json, as diffusers and transformers write it."""
    found = check_part(place, _stem(part), variant)
    config = read_json(place / "config.json")
    listed = config.get("architectures")
    named = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else "network")
    headless = part == QWEN3 and named == "Qwen3ForCausalLM"
    if named != network_class.__name__ and not headless:
        raise WeightFileError(f"{shown(place)} holds a {named}, and a {network_class.__name__} is needed"[:300])
    tensors = read_tensors(*(file for file in found.files if file.suffix == SAFETENSORS), meta=meta)
    if part == QWEN3:
        return _Recipe(config, qwen3_names(tensors))
    return _Recipe(config, renewed_vae_names(tensors) if part == VAE else tensors)


def _recipe(family: str, part: str, component: str, tensors: Tensors, dtype: torch.dtype) -> _Recipe:
    """The recipe of a part of a file: the configuration follows from the shapes."""
    if family in _OF_QWEN3:
        return _recipe_with_qwen3(family, part, tensors, dtype)
    if part == T5:
        named = t5_names(tensors)
        return _Recipe(t5_config(shapes_of(named)), named)
    of_diffusers = has_diffusers_names(tensors)
    if component == "unet" and of_diffusers:
        return _Recipe(diffusers_unet_config(shapes_of(tensors), family), tensors)
    if component == "unet":
        config = unet_config(shapes_of(tensors), family)
        return _Recipe(config, unet_names(tensors, config))
    if part == DENOISER and of_diffusers:
        return _Recipe(diffusers_transformer_config(shapes_of(tensors)), tensors)
    if part == DENOISER:
        return _Recipe(transformer_config(shapes_of(tensors)), transformer_names(tensors))
    plain = {
        name: tensor.unpack(dtype) if isinstance(tensor, PackedWeight) else tensor for name, tensor in tensors.items()
    }
    if part == VAE and of_diffusers:
        return _Recipe(diffusers_vae_config(shapes_of(plain), family), renewed_vae_names(plain))
    if part == VAE:
        config = vae_config(shapes_of(plain), family)
        return _Recipe(config, vae_names(plain, config))
    named = clip_g_names(plain) if part == CLIP_G else dict(plain)
    return _Recipe(clip_config(shapes_of(named), family, component), named)


def _recipe_with_qwen3(family: str, part: str, tensors: Tensors, dtype: torch.dtype) -> _Recipe:
    """The recipe of a part of FLUX.2 klein or Z-Image."""
    shapes = shapes_of(tensors)
    if part == DENOISER and family == "z-image":
        return _Recipe(z_image_config(shapes), z_image_names(tensors) if "x_embedder.weight" in tensors else tensors)
    if part == DENOISER:
        return _Recipe(klein_config(shapes), klein_names(tensors))
    plain = {
        name: tensor.unpack(dtype) if isinstance(tensor, PackedWeight) else tensor for name, tensor in tensors.items()
    }
    if part == QWEN3:
        named = qwen3_names(plain)
        return _Recipe(qwen3_config(shapes_of(named)), named)
    if family == "flux2":
        return _Recipe(*klein_vae(plain, shapes))
    if has_diffusers_names(tensors):
        return _Recipe(diffusers_vae_config(shapes, family), renewed_vae_names(plain))
    config = vae_config(shapes, family)
    return _Recipe(config, vae_names(plain, config))
