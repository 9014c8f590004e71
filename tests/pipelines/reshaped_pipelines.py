"""A pipeline with another number of latent channels, and otherwise the weights of its source."""

from __future__ import annotations

import copy
from typing import Any

import torch


def reshaped(pipeline: Any, channels: int) -> Any:
    """`pipeline` if its VAE has `channels` latent channels, otherwise a copy that has.

    Weights are kept, or cut or repeated where the shape changes, so its images, though wrong, have structure.
    """
    vae = pipeline.vae
    if vae.config.latent_channels == channels:
        return pipeline
    parts = dict(pipeline.components)
    parts["vae"] = _resized(vae, latent_channels=channels)
    if "unet" in parts:
        parts["unet"] = _resized(parts["unet"], in_channels=channels, out_channels=channels)
    else:
        parts["transformer"] = _resized(parts["transformer"], in_channels=4 * channels)
    twin = type(pipeline)(**parts)
    twin.set_progress_bar_config(disable=True)
    return twin


def _resized(module: Any, **config: int) -> Any:
    twin = type(module).from_config({**copy.copy(module.config), **config})
    old = module.state_dict()
    twin.load_state_dict({name: _fitted(old[name], value.shape) for name, value in twin.state_dict().items()})
    return twin.eval()


def _fitted(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    for dimension, size in enumerate(shape):
        repeats = -(-size // tensor.shape[dimension])
        tensor = torch.cat([tensor] * repeats, dimension).narrow(dimension, 0, size)
    return tensor
