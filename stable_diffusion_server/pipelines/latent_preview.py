"""A small picture from latents without decoding them: the nearest linear map. Knows one VAE, and no jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.pipelines.base import PipelineState, translate_torch_errors

# Longest side of a preview in pixels, and what a shorter one is enlarged towards.
LARGEST, SMALLEST = 128, 64
_PATCH, _SIDE = 32, 256


class LatentPreviewer:
    """Previews of one family's states.

    `unscaled(state, latents)` gives the VAE's latents, 1 × channels × h × w, of latents as the state has them.
    """

    def __init__(self, vae: Any, unscaled: Callable[[PipelineState[Any], torch.Tensor], torch.Tensor]) -> None:
        self._vae = vae
        self._unscaled = unscaled
        self._map: torch.Tensor | None = None

    def preview(self, state: PipelineState[Any]) -> NDArray[np.uint8]:
        """Where a state stands, height × width × 3, at most 128 pixels a side: what it expects to come to."""
        with translate_torch_errors():
            if self._map is None:
                self._map = fit(self._vae)
            expected = state.latents if state.expected is None else state.expected
            latents = self._unscaled(state, expected).float()
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
    """The linear map, (channels + 1) × 3, from this VAE's latents to colours in 0..1; the last row is added.

    Least squares over squares of chance colours, whose latents the VAE itself gives. One encoding of 256 × 256.
    """
    count = _SIDE // _PATCH
    squares = torch.rand((1, 3, count, count), generator=torch.Generator("cpu").manual_seed(0))
    # Where weights travel, the VAE is brought to its device by the very call that encodes.
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None) or vae.device
    picture = torch.nn.functional.interpolate(squares, scale_factor=_PATCH, mode="nearest").to(device)
    latents = vae.encode((2 * picture - 1).to(vae.dtype)).latent_dist.mode().float()
    colours = torch.nn.functional.adaptive_avg_pool2d(picture, latents.shape[-2:])
    known = torch.cat([latents.flatten(2)[0].T, torch.ones(latents[0, 0].numel(), 1, device=latents.device)], dim=1)
    # On the CPU, where every backend has the solver.
    solution = torch.linalg.lstsq(known.cpu(), colours.flatten(2)[0].T.cpu()).solution
    return solution.to(latents.device)
