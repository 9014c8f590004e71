"""Reads IP-Adapters: what makes tokens of an image's features, and the weights by which a UNet attends to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection

from stable_diffusion_server.errors import ModelLoadError
from stable_diffusion_server.pipelines.adapters.image_attention import ImageLayers, cross_attentions
from stable_diffusion_server.pipelines.loading.checkpoint_tensors import read_tensors
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

PROJECTION, ATTENTION = "image_proj.", "ip_adapter."
# Tokens of an image by the plain adapter, and numbers of a head of the resampler.
_TOKENS, _HEAD = 4, 64
_MOST_BLOCKS = 16
_BLOCK = re.compile(r"layers\.(\d{1,2})\.([01])\.(.{1,40})")
# Parts of a resampler's block by the original names → ours.
_RESAMPLER = {
    "0.norm1": "ln0", "0.norm2": "ln1", "0.to_q": "attn.to_q", "0.to_out": "attn.to_out.0",
    "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2",
}  # fmt: skip
_FULL = {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"}


@dataclass(frozen=True, slots=True, eq=False)
class ImageAdapter:
    """An IP-Adapter. `projection` makes tokens of features: images × tokens × channels.

    It reads the encoder's embedding of an image if it is `pooled`, otherwise the last hidden states but one.
    """

    projection: Any = field(repr=False)
    layers: ImageLayers = field(repr=False)
    pooled: bool = False


def read_image_adapter(file: Path, unet: Any, dtype: torch.dtype, device: torch.device) -> ImageAdapter:
    """Read an adapter for a UNet, in `dtype` onto `device`. Raises `ModelLoadError` with what does not fit."""
    try:
        tensors = read_tensors(file)
    except WeightFileError as error:
        raise ModelLoadError(f"{error}.") from error
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(plain) < len(tensors):
        raise ModelLoadError(f"{file.name} holds packed weights; an IP-Adapter is read in fp32, fp16 and bf16.")
    parts = {name.removeprefix(PROJECTION): tensor for name, tensor in plain.items() if name.startswith(PROJECTION)}
    projection = _projection(parts, file.name)
    layers = _layers({name: tensor for name, tensor in plain.items() if name.startswith(ATTENTION)}, unet, file.name)
    projection.requires_grad_(False).eval().to(device, dtype)
    return ImageAdapter(
        projection,
        {path: (key.to(device, dtype), value.to(device, dtype)) for path, (key, value) in layers.items()},
        pooled=isinstance(projection, ImageProjection),
    )


def _layers(tensors: Mapping[str, torch.Tensor], unet: Any, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weights of each layer; the file numbers all attentions, of which every second attends to a prompt."""
    attentions = cross_attentions(unet)
    if len(tensors) != 2 * len(attentions):
        count = len(tensors) // 2
        raise ModelLoadError(f"{name} has weights for {count} layers, and the model has {len(attentions)}.")
    layers = {}
    for number, (path, attention) in enumerate(attentions.items()):
        names = [f"{ATTENTION}{2 * number + 1}.to_{kind}_ip.weight" for kind in "kv"]
        wanted = (attention.inner_kv_dim, attention.cross_attention_dim)
        found = [tuple(tensors[one].shape) if one in tensors else None for one in names]
        if found != [wanted, wanted]:
            raise ModelLoadError(f"{name} is for another model: {names[0]} has the shape {found[0]}, not {wanted}.")
        layers[path] = (tensors[names[0]], tensors[names[1]])
    return layers


def _projection(tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    try:
        network, named = _network_of(tensors)
        network.load_state_dict(named, strict=True, assign=True)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"{name} lacks parts of an IP-Adapter, or they do not fit each other.") from error
    return network


def _network_of(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The network without weights, and these by its names."""
    with torch.device("meta"):
        if "proj.weight" in tensors:
            width, features = tensors["proj.weight"].shape
            network: Any = ImageProjection(features, width // _TOKENS, _TOKENS)
            return network, {name.replace("proj.", "image_embeds."): tensor for name, tensor in tensors.items()}
        if "proj.3.weight" in tensors:
            features, width = tensors["proj.0.weight"].shape[1], tensors["proj.3.weight"].shape[0]
            return IPAdapterFullImageProjection(features, width), {
                _renamed(name, _FULL): tensor for name, tensor in tensors.items()
            }
        return _resampler(tensors)


def _resampler(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    _, queries, width = tensors["latents"].shape
    found = [(name, _BLOCK.fullmatch(name)) for name in tensors]
    depth = 1 + max((int(match[1]) for _, match in found if match), default=-1)
    heads = tensors["layers.0.0.to_q.weight"].shape[0] // _HEAD
    inner = tensors["layers.0.1.1.weight"].shape[0]
    if not (0 < depth <= _MOST_BLOCKS and heads and math.prod((queries, width))):
        raise ValueError(f"a resampler of {depth} blocks and {heads} heads")
    network = IPAdapterPlusImageProjection(
        embed_dims=tensors["proj_in.weight"].shape[1],
        output_dims=tensors["proj_out.weight"].shape[0],
        hidden_dims=width,
        depth=depth,
        dim_head=_HEAD,
        heads=heads,
        num_queries=queries,
        ffn_ratio=inner / width,
    )
    named = {}
    for name, match in found:
        tensor = tensors[name]
        if match is None:
            named[name] = tensor
        elif match[2] == "0" and match[3] == "to_kv.weight":
            start = f"layers.{match[1]}.attn.to_"
            named[f"{start}k.weight"], named[f"{start}v.weight"] = tensor.chunk(2)
        else:
            named[f"layers.{match[1]}.{_renamed(f'{match[2]}.{match[3]}', _RESAMPLER)}"] = tensor
    return network, named


def _renamed(name: str, names: Mapping[str, str]) -> str:
    start, _, last = name.rpartition(".")
    return f"{names[start]}.{last}"
