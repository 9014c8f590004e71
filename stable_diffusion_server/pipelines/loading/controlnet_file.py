"""Loads a ControlNet from one safetensors file, with original or diffusers' tensor names, without a config.json."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.library import FileIdentity, Kind, identify
from stable_diffusion_server.pipelines.loading.checkpoint_configs import (
    Shapes,
    base_configs,
    count,
    side_of,
    unet_additions,
    unet_inputs,
)
from stable_diffusion_server.pipelines.loading.checkpoint_names import xlabs_names
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import forget_pages, read_tensors, shapes_of
from stable_diffusion_server.pipelines.loading.diffusers_configs import diffusers_unet_inputs, transformer_sizes
from stable_diffusion_server.pipelines.loading.network_assembly import assemble
from stable_diffusion_server.pipelines.loading.weight_files import SAFETENSORS, WeightFileError, shown

_PREFIX = "control_model."
_CLASSES = {
    "ControlNetModel": diffusers.ControlNetModel,
    "ControlNetUnionModel": diffusers.ControlNetUnionModel,
    "FluxControlNetModel": diffusers.FluxControlNetModel,
}
# Classes of files by their family, and whether they are unions.
_CLASS_OF = {
    ("sd15", False): "ControlNetModel",
    ("sdxl", False): "ControlNetModel",
    ("sdxl", True): "ControlNetUnionModel",
    ("flux", False): "FluxControlNetModel",
    ("flux", True): "FluxControlNetModel",
}
# Variants that are loaded.
_VARIANTS = ("", "union", "xlabs")
# SDXL's size and crop, which diffusers' own conversion leaves out.
_ADDED = {f"label_emb.0.{old}.": f"add_embedding.linear_{new}." for old, new in ((0, 1), (2, 2))}
_MODES = "controlnet_mode_embedder.weight"
_HINT, _COND = "input_hint_block", "controlnet_cond_embedding"


def class_of_file(file: Path) -> str:
    """The diffusers class of the ControlNet in a file. Raises `ModelLoadError` for a file that holds none."""
    identity = identify(file)
    found = _CLASS_OF.get((identity.family, identity.variant == "union"))
    if identity.kind is not Kind.CONTROLNET or identity.reason or found is None:
        raise ModelLoadError(f"{shown(file)} {identity.reason or 'is not a ControlNet that is read from one file'}.")
    return found


def controlnet_of_file(file: Path, control_class: str, dtype: torch.dtype, *, meta: bool = False) -> Any:
    """The ControlNet in a file, with `meta` without its weights. Opens no socket.

    Raises `ModelLoadError` for a file of another kind or class, and `WeightFileError` if weights are missing, left over
    or of another shape.
    """
    identity = _identified(file, control_class)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(file, meta=meta).items()}
    if identity.variant == "xlabs":
        tensors = xlabs_names(tensors)
    shapes = shapes_of(tensors)
    if control_class == "FluxControlNetModel":
        config = _flux_config(shapes)
    elif control_class == "ControlNetUnionModel":
        config = _union_config(shapes, identity)
    elif identity.layout == "original":
        config = _config(shapes, identity.family)
        tensors = _names(tensors, config)
    else:
        config = _diffusers_config(shapes, identity.family)
    network = assemble(_CLASSES[control_class], config, tensors, dtype)
    if not meta:
        forget_pages(file)
    return network


def _identified(file: Path, control_class: str) -> FileIdentity:
    """What the file's header says, if that can be loaded as `control_class`. Raises `ModelLoadError`."""
    name = shown(file)
    if file.suffix != SAFETENSORS:
        raise ModelLoadError(f"{name} is a file, and ControlNets are read from .safetensors files and folders.")
    identity = identify(file)
    if identity.kind is not Kind.CONTROLNET or identity.reason:
        raise ModelLoadError(f"{name} {identity.reason or f'holds a {identity.kind}, and no ControlNet'}.")
    if control_class not in _CLASSES:
        raise ModelLoadError(
            f"{name} is a file, and a {control_class} is read from a diffusers folder, since the file does not say "
            f"which layers its blocks belong to."
        )
    known = identity.variant in _VARIANTS
    if not known or _CLASS_OF.get((identity.family, identity.variant == "union")) != control_class:
        what = " ".join(part for part in (identity.variant, *identity.families) if part)
        raise ModelLoadError(f"{name} is a ControlNet of the kind {what}, and a {control_class} is needed.")
    return identity


def _config(shapes: Shapes, family: str) -> dict[str, Any]:
    last = count(shapes, rf"{_HINT}\.(\d+)\.") - 1
    # Pairs of convolutions between the first and the last one: the second of each pair changes the width.
    hint = [side_of(shapes, f"{_HINT}.{number}.weight", 0) for number in range(0, last, 4)]
    return _known(
        {
            **unet_inputs(shapes, family),
            "conditioning_channels": side_of(shapes, f"{_HINT}.0.weight", 1),
            "conditioning_embedding_out_channels": hint,
            **unet_additions(shapes, family, "label_emb.0.0.weight"),
        },
        diffusers.ControlNetModel,
    )


def _diffusers_config(shapes: Shapes, family: str) -> dict[str, Any]:
    blocks = range(1, count(shapes, rf"{_COND}\.blocks\.(\d+)\."), 2)
    hint = [f"{_COND}.conv_in", *(f"{_COND}.blocks.{number}" for number in blocks)]
    return _known(
        {
            **diffusers_unet_inputs(shapes, family),
            "conditioning_channels": side_of(shapes, f"{_COND}.conv_in.weight", 1),
            "conditioning_embedding_out_channels": [side_of(shapes, f"{name}.weight", 0) for name in hint],
            **unet_additions(shapes, family, "add_embedding.linear_1.weight"),
        },
        diffusers.ControlNetModel,
    )


def _union_config(shapes: Shapes, identity: FileIdentity) -> dict[str, Any]:
    """As the files of xinsir's ControlNet++ are, whose names are diffusers'; heads are not in the file."""
    if identity.layout != "diffusers":
        raise WeightFileError("a union with the original names is not read; take the diffusers file")
    kinds, channels = (side_of(shapes, "task_embedding", axis) for axis in (0, 1))
    return {
        **_diffusers_config(shapes, identity.family),
        "num_control_type": kinds,
        "num_trans_channel": channels,
        "num_trans_layer": count(shapes, r"transformer_layes\.(\d+)\."),
        "num_proj_channel": side_of(shapes, "spatial_ch_projs.weight", 0),
        # The kinds' embeddings come after the projection of each of them.
        "projection_class_embeddings_input_dim": side_of(shapes, "add_embedding.linear_1.weight", 1),
    }


def _flux_config(shapes: Shapes) -> dict[str, Any]:
    hint = "input_hint_block.conv_out.weight"
    base = base_configs("flux")["denoiser"]
    config = {
        **base,
        **transformer_sizes(shapes),
        "in_channels": side_of(shapes, "x_embedder.weight", 1),
        "conditioning_embedding_channels": side_of(shapes, hint, 0) if hint in shapes else None,
        "num_mode": side_of(shapes, _MODES, 0) if _MODES in shapes else None,
    }
    return _known(config, diffusers.FluxControlNetModel)


def _known(config: Mapping[str, Any], network_class: type) -> dict[str, Any]:
    """Without what only the denoiser has."""
    names = inspect.signature(network_class).parameters
    return {name: value for name, value in config.items() if name in names}


def _names(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """By diffusers' names: its own table, which moves tensors without touching them and makes absent ones `None`."""
    named = dict(convert_controlnet_checkpoint(dict(tensors), config))
    for old, new in _ADDED.items():
        named |= {new + name.removeprefix(old): tensor for name, tensor in tensors.items() if name.startswith(old)}
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    used = {id(tensor) for tensor in named.values()}
    if left := sorted(name for name, tensor in tensors.items() if id(tensor) not in used):
        raise WeightFileError(f"{len(left)} weights belong to another model ({', '.join(left[:2])[:200]})")
    return named
