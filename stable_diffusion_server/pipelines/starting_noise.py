"""The noise that a request starts from: that of its seed, or one between those of two seeds."""

from __future__ import annotations

import torch

from stable_diffusion_server.pipelines.base import seeded
from stable_diffusion_server.pipelines.philox import gpu_noise
from stable_diffusion_server.types import NOISE_SEEDS, DiffusionRequest

# Mean cosine above which two noises count as one direction.
_PARALLEL = 0.9995


def starting_noise(
    request: DiffusionRequest, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Normal noise of `shape` (… × h × w) from a generator of the request's seed, or of one later for a second pass.

    With a subseed it is turned towards that seed's noise along the sphere, column by column, as AUTOMATIC1111 does:
    with strength 0 it is that of the seed, with 1 that of the subseed.

    The numbers are those that the stock pipelines draw from the same generator, in `dtype`; with the option
    `noise_source` gpu those of a graphics card, for all 64 bits of the seed.
    """
    options = dict(request.sampling)
    later = (generator.initial_seed() - request.seed) % NOISE_SEEDS
    of_gpu = options.get("noise_source") == "gpu"
    noise = gpu_noise(request.seed + later, shape).to(dtype) if of_gpu else _drawn(shape, generator, dtype)
    if "subseed_strength" not in options:
        return noise
    subseed = int(options["subseed"]) + later
    other = gpu_noise(subseed, shape).to(dtype) if of_gpu else _drawn(shape, seeded(subseed), dtype)
    return _between(noise.float(), other.float(), float(options["subseed_strength"])).to(dtype)


def _drawn(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def _between(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation over the columns (Shoemake 1985); linear where they point the same way."""
    directions = [noise / noise.norm(dim=-2, keepdim=True) for noise in (one, other)]
    cosine = (directions[0] * directions[1]).sum(dim=-2, keepdim=True)
    if float(cosine.mean()) > _PARALLEL:
        return (1 - share) * one + share * other
    angle = torch.acos(cosine.clamp(-1, 1))
    return (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)
