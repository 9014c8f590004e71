"""Previews of latents by a linear map to RGB, fitted to the VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.base import PipelineState, translate_torch_errors

# Longest side of a preview in pixels; one shorter than SMALLEST is enlarged to at most LARGEST.
LARGEST, SMALLEST = 128, 64
_PATCH, _SIDE = 32, 256


class LatentPreviewer:
    """Makes the previews of one family.

    `unscaled(state, latents)` converts a state's latents to the VAE's own: 1 × channels × h × w.
    """

    def __init__(self, vae: Any, unscaled: Callable[[PipelineState[Any], torch.Tensor], torch.Tensor]) -> None:
        self._vae = vae
        self._unscaled = unscaled
        self._map: torch.Tensor | None = None

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """The predicted final image of a state, height × width × 3, at most 128 pixels a side."""
        with translate_torch_errors():
            if self._map is None:
                self._map = fit(self._vae)
            predicted = state.latents if state.predicted_original is None else state.predicted_original
            latents = self._unscaled(state, predicted).float()
            longest = max(latents.shape[-2:])
            if longest > LARGEST:
                latents = torch.nn.functional.adaptive_avg_pool2d(
                    latents, [max(1, round(side * LARGEST / longest)) for side in latents.shape[-2:]]
                )
            colours = torch.tensordot(self._map[:-1], latents[0], dims=([0], [0])) + self._map[-1, :, None, None]
            if longest < SMALLEST:
                colours = torch.nn.functional.interpolate(
                    colours[None], scale_factor=LARGEST // longest, mode="bilinear"
                )[0]
            levels = (colours.clamp(0, 1).nan_to_num() * 255).round().to(torch.uint8)
            pixels: NDArray[np.uint8] = levels.permute(1, 2, 0).cpu().numpy()
            return pixels


def fit(vae: Any) -> torch.Tensor:
    """The linear map, (channels + 1) × 3, from this VAE's latents to RGB in 0..1; the last row is the offset.

    Least squares over a 256 × 256 image of randomly coloured squares that the VAE encodes once.
    """
    count = _SIDE // _PATCH
    squares = torch.rand((1, 3, count, count), generator=torch.Generator("cpu").manual_seed(0))
    # With offloading, the VAE moves to its device during the call that encodes.
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    image = torch.nn.functional.interpolate(squares, scale_factor=_PATCH, mode="nearest").to(device)
    latents = vae.encode((2 * image - 1).to(vae.dtype)).latent_dist.mode().float()
    colours = torch.nn.functional.adaptive_avg_pool2d(image, latents.shape[-2:])
    inputs = torch.cat([latents.flatten(2)[0].T, torch.ones(latents[0, 0].numel(), 1, device=latents.device)], dim=1)
    # On the CPU: not every backend has this solver.
    solution = torch.linalg.lstsq(inputs.cpu(), colours.flatten(2)[0].T.cpu()).solution
    return solution.to(latents.device)
