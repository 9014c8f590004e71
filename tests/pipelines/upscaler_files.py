"""Makes upscaler files with random weights, in the names that their trainers write."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def rrdb(blocks: int = 2, scale: int = 4, channels: int = 3, width: int = 16) -> Tensors:
    """A Real-ESRGAN network; 12 channels stand for one that takes the pixels of 2 × 2 cells."""
    random, tensors = torch.Generator().manual_seed(0), {}

    def layer(name: str, inputs: int, outputs: int) -> None:
        scaled = torch.randn(outputs, inputs, 3, 3, generator=random) * (1.9 / (9 * inputs)) ** 0.5
        tensors[f"{name}.weight"] = scaled
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.01

    layer("conv_first", channels, width)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for number in range(5):
                outputs = width if number == 4 else 32
                layer(f"body.{block}.rdb{dense}.conv{number + 1}", width + 32 * number, outputs)
    layer("conv_body", width, width)
    layer("conv_up1", width, width)
    if scale == 4:
        layer("conv_up2", width, width)
    layer("conv_hr", width, width)
    layer("conv_last", width, 3)
    return tensors


def in_old_names(tensors: Tensors, blocks: int = 2) -> Tensors:
    """The same network as ESRGAN's own files name it."""
    layers = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3"}
    layers |= {"conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    renamed = {}
    for name, tensor in tensors.items():
        layer, ending = name.rsplit(".", 1)
        if layer not in layers:
            _, block, dense, conv = layer.split(".")
            layers[layer] = f"model.1.sub.{block}.RDB{dense[3:]}.{conv}.0"
        renamed[f"{layers[layer]}.{ending}"] = tensor
    return renamed


def in_bsrgan_names(tensors: Tensors) -> Tensors:
    """The same network as BSRGAN's files name it."""
    pairs = (("body.", "RRDB_trunk."), (".rdb", ".RDB"), ("conv_body", "trunk_conv"), ("conv_up", "upconv"))
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for ours, theirs in (*pairs, ("conv_hr", "HRconv")):
            new = new.replace(ours, theirs) if not (ours == "body." and not name.startswith("body.")) else new
        renamed[new] = tensor
    return renamed


def compact(width: int = 16, layers: int = 4, scale: int = 2) -> Tensors:
    """A compact network of Real-ESRGAN."""
    random, tensors, inputs = torch.Generator().manual_seed(1), {}, 3
    for number in range(layers + 2):
        outputs = width if number <= layers else 3 * scale * scale
        spread = (1.9 / (9 * inputs)) ** 0.5 * (1 if number <= layers else 0.3)
        tensors[f"body.{2 * number}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=random) * spread
        tensors[f"body.{2 * number}.bias"] = torch.zeros(outputs)
        if number <= layers:
            tensors[f"body.{2 * number + 1}.weight"] = torch.full((width,), 0.25)
        inputs = width
    return tensors


def saved(folder: Path, name: str, tensors: Tensors) -> Path:
    """Write a network as a file in a folder of upscalers."""
    place = folder / "upscale_models" / f"{name}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, place)
    return place
