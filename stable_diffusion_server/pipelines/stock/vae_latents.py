"""Latents of stock pipelines in their VAE's own scale and layout, for decoding and for previews."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from stable_diffusion_server.pipelines.stock_classes import stock_class

# Beginnings of pipeline classes whose latents are understood besides those that their source scales by factor and shift
# of the VAE's configuration (`scaled`); the longer ones first. `statistics`: mean and deviation by channel, of a VAE
# for videos; `normed`: FLUX.2's batch norm; empty: the class decodes.
_LAYOUTS = (
    ("Flux2", "normed"),
    ("ZImageOmni", ""),
    ("QwenImageLayered", ""),
    ("QwenImage21", ""),
    ("QwenImage", "statistics"),
    ("Krea2", "statistics"),
)


def layout_of(class_name: str) -> str:
    """How a pipeline class scales its latents; empty where its own decoding is used."""
    known = stock_class(class_name)
    if known is None or known.modular:
        return ""
    named = (layout for start, layout in _LAYOUTS if class_name.startswith(start))
    return next(named, "scaled" if known.scaled else "")


def latents_for_vae(pipeline: Any, latents: torch.Tensor, height: int, width: int, *, returned: bool) -> torch.Tensor:
    """Latents in the VAE's own scale: 1 × channels × h × w, or 1 × channels × 1 × h × w for a VAE for videos.

    `returned` ones are what the call returned, others are of a callback: FLUX.2 returns them unpacked and unscaled.
    """
    vae, layout = pipeline.vae, layout_of(type(pipeline).__name__)
    if layout == "normed":
        return latents if returned and latents.ndim == 4 else _unnormed(pipeline, latents, height, width)
    if latents.ndim == 3:
        # Krea 2's takes the sizes alone.
        scale = () if hasattr(pipeline, "patch_size") else (pipeline.vae_scale_factor,)
        latents = pipeline._unpack_latents(latents, height, width, *scale)
    if layout == "statistics":
        shape = (1, -1, 1, 1, 1)
        mean, deviation = (
            torch.tensor(numbers, device=latents.device, dtype=torch.float32).view(shape)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return latents * deviation.to(latents) + mean.to(latents)
    if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
        mean, deviation = (
            torch.tensor(numbers, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return latents * deviation / vae.config.scaling_factor + mean
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


def _unnormed(pipeline: Any, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """FLUX.2's packed latents, whose patches of 2 × 2 were scaled by a batch norm."""
    side = 2 * pipeline.vae_scale_factor
    norm = pipeline.vae.bn
    patches = latents.transpose(1, 2).reshape(1, -1, height // side, width // side)
    mean, variance = (one.view(1, -1, 1, 1).to(patches) for one in (norm.running_mean, norm.running_var))
    unscaled = patches * torch.sqrt(variance + pipeline.vae.config.batch_norm_eps) + mean
    unpatched: torch.Tensor = pipeline._unpatchify_latents(unscaled)
    return unpatched


class PreviewVae:
    """A VAE as previews are fitted to it: pixels and latents have four dimensions, and `encode` a distribution."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._hf_hook = getattr(vae, "_hf_hook", None)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        device: torch.device = self._vae.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        dtype: torch.dtype = self._vae.dtype
        return dtype

    def encode(self, pixels: torch.Tensor) -> Any:
        """The distribution of the latents of pixels in -1..1: 1 × channels × h × w."""
        videos = layout_of_vae(self._vae) == 5
        encoded = self._vae.encode(pixels[:, :, None] if videos else pixels)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        flat = latents[:, :, 0] if videos else latents
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: flat))


def layout_of_vae(vae: Any) -> int:
    """Dimensions of a VAE's latents: 5 for one made for videos, otherwise 4."""
    return 5 if "latents_mean" in vae.config and "z_dim" in vae.config else 4
