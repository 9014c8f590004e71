"""Latents that go from one request to the next without being decoded: kept as an array, enlarged by interpolation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import NotFinite
from stable_diffusion_server.types import LatentArray, LatentResize


class _Interpolation(NamedTuple):
    """The arguments of torch's `interpolate`."""

    mode: str
    antialias: bool = False


_INTERPOLATIONS = {
    LatentResize.BILINEAR: _Interpolation("bilinear"),
    LatentResize.ANTIALIASED: _Interpolation("bilinear", antialias=True),
    LatentResize.BICUBIC: _Interpolation("bicubic"),
    LatentResize.BICUBIC_ANTIALIASED: _Interpolation("bicubic", antialias=True),
    LatentResize.NEAREST: _Interpolation("nearest"),
    LatentResize.NEAREST_EXACT: _Interpolation("nearest-exact"),
}


def kept_latents(latents: torch.Tensor) -> NDArray[np.float32]:
    """Latents (1 × channels × h × w) as an array, channels × h × w. Raises `NotFinite`."""
    if not torch.isfinite(latents).all():
        raise NotFinite("The latents are not finite; another seed or fewer guidance may help.")
    kept: NDArray[np.float32] = latents[0].float().cpu().numpy()
    return kept


def enlarged(latents: LatentArray, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Latents enlarged to 1 × channels × height × width, float32; what exceeds the aspect ratio is cut off evenly.

    Linear filters commute with the scale of the VAE, so that it does not matter which side of it they run on.
    """
    given = torch.from_numpy(latents.values)[None].to(device)
    scale = max(height / given.shape[-2], width / given.shape[-1])
    covering = (max(height, round(given.shape[-2] * scale)), max(width, round(given.shape[-1] * scale)))
    mode, antialias = _INTERPOLATIONS[latents.resize]
    whole = torch.nn.functional.interpolate(given, size=covering, mode=mode, antialias=antialias)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return whole[..., top : top + height, left : left + width]
