"""Builds a network from a configuration and tensors, and requires all of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from transformers.initialization import no_init_weights

from stable_diffusion_server.pipelines.loading.packed_weights import (
    PackedWeight,
    can_be_packed,
    packed_layer,
)
from stable_diffusion_server.pipelines.loading.weight_files import WeightFileError

# Bytes that are converted between two calls of `release`.
_RELEASED = 128 * 2**20

# Names of tensors that older files hold and networks compute themselves.
_COMPUTED = ("position_ids", "logit_scale")


def assemble(
    network_class: Any,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | PackedWeight],
    dtype: torch.dtype,
    *,
    keep_packed: bool = False,
    pack: Callable[[torch.Tensor], PackedWeight | None] | None = None,
    release: Callable[[], None] = lambda: None,
) -> Any:
    """A network with these weights in `dtype`; with `keep_packed`, linear layers keep packed weights.

    `pack` packs the weights of linear layers and convolutions that are not packed yet, unless it returns `None`.
    `release` is called now and then, when tensors were converted that are not needed any more.

    Raises `WeightFileError` when weights are missing, left over, or of another shape: they would otherwise be random,
    or ignored.
    """
    # Without the second, random numbers for weights that do not exist yet take most of the time of a small load.
    with init_empty_weights(include_buffers=False), no_init_weights():
        if issubclass(network_class, diffusers.ModelMixin):
            network = network_class.from_config(dict(config))
        else:
            network = network_class(network_class.config_class(**config))
    given = _as_named(network, tensors)
    _check(network, given)
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, PackedWeight] = {}
    converted = 0
    for name, tensor in given.items():
        path, _, leaf = name.rpartition(".")
        layer = network.get_submodule(path)
        if isinstance(tensor, PackedWeight):
            if keep_packed and type(layer) is torch.nn.Linear:
                packed[name] = tensor
            else:
                plain[name] = tensor.unpack(dtype)
            continue
        smaller = pack(tensor) if pack is not None and leaf == "weight" and can_be_packed(layer) else None
        if smaller is not None:
            packed[name] = smaller
        else:
            plain[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        converted += tensor.nbytes
        if converted >= _RELEASED:
            converted = 0
            release()
    network.load_state_dict(plain, strict=False, assign=True)
    for name, weight in packed.items():
        _replace(network, name.rpartition(".")[0], weight)
    if hasattr(network, "tie_weights"):
        network.tie_weights()
    network.requires_grad_(False)
    return network.eval()


def _as_named(network: Any, tensors: Mapping[str, torch.Tensor | PackedWeight]) -> dict[str, Any]:
    """The tensors by the network's own names, without those it computes, and with those it uses twice."""
    wanted = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COMPUTED)}
    if not hasattr(network, "text_model"):  # transformers 5.6 dropped the level `text_model` of CLIPTextModel
        given = {name.removeprefix("text_model."): tensor for name, tensor in given.items()}
    if "shared.weight" in given and "encoder.embed_tokens.weight" in wanted:
        given["encoder.embed_tokens.weight"] = given["shared.weight"]
    if "text_projection.weight" not in wanted:  # files of CLIP-L may hold one, which is of no use here
        given.pop("text_projection.weight", None)
    return given


def _check(network: Any, given: Mapping[str, Any]) -> None:
    wanted = network.state_dict()
    if lacking := sorted(wanted.keys() - given.keys()):
        raise WeightFileError(f"{len(lacking)} of its {len(wanted)} weights are missing ({', '.join(lacking[:2])})")
    if left := sorted(given.keys() - wanted.keys()):
        raise WeightFileError(f"{len(left)} weights belong to another model ({', '.join(left[:2])[:200]})")
    for name, tensor in given.items():
        if tuple(tensor.shape) != tuple(wanted[name].shape):
            raise WeightFileError(
                f"{name} has the shape {tuple(tensor.shape)}, and {tuple(wanted[name].shape)} belongs there"
            )


def _replace(network: Any, path: str, weight: PackedWeight) -> None:
    """Put a packed layer in the place of a plain one; its bias is already there."""
    parent, _, leaf = path.rpartition(".")
    setattr(network.get_submodule(parent), leaf, packed_layer(network.get_submodule(path), weight))
