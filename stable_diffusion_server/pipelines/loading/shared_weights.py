"""Lets equal weights of several models share their memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

Networks = Mapping[str, torch.nn.Module]

# Numbers compared before a whole tensor is, since most weights of different models differ at once.
_SAMPLE = 64


def share_equal_weights(networks: Networks, others: Iterable[Networks]) -> int:
    """Give the weights of `networks` the memory of equal weights in `others`; returns the bytes that this frees.

    Weights are compared with those of the same component and name, by all of their numbers. The modules stay separate,
    and so do adapters, hooks and conversions to another type; whoever writes into a weight would change all of them.
    """
    known = [dict(_weights(other)) for other in others]
    freed = 0
    for name, weight in _weights(networks):
        for other in (weights[name] for weights in known if name in weights):
            if weight.data_ptr() != other.data_ptr() and _are_equal(weight.data, other.data):
                freed += weight.nbytes
                weight.data = other.data
                break
    return freed


def storages_of(networks: Iterable[torch.nn.Module]) -> dict[tuple[str, int], int]:
    """The bytes of each piece of memory that holds weights, by its place: equal places are shared memory."""
    storages: dict[tuple[str, int], int] = {}

    def visit(tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor is made of others
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            storages[str(tensor.device), storage.data_ptr()] = storage.nbytes()

    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            visit(tensor)
    return storages


def _weights(networks: Networks) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """The plain weights by component and name; the layers of an adapter hold the weights under a longer name.

    So does a language model with a head: FLUX.2 klein and Z-Image have the same Qwen3 with and without one.
    """
    for component, network in networks.items():
        headless = f"{getattr(network, 'base_model_prefix', '')}."
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if type(tensor.data) is torch.Tensor and not tensor.is_meta and tensor.numel():
                yield (component, name.removeprefix(headless).replace(".base_layer.", ".")), tensor


def _are_equal(weight: torch.Tensor, other: torch.Tensor) -> bool:
    layouts = ((one.shape, one.stride(), one.dtype, one.device) for one in (weight, other))
    if next(layouts) != next(layouts):
        return False
    count = min(_SAMPLE, weight.numel())
    start, same = (one.as_strided((count,), (1,), one.storage_offset()) for one in (weight, other))
    return bool(torch.equal(start, same) and torch.equal(weight, other))
