"""What a request's spacing of steps and other options mean for a scheduler: its configuration, noise and timesteps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverSDEScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from diffusers.schedulers.scheduling_utils import AysSchedules

from stable_diffusion_server.pipelines.scheduler_rows import AYS, SCHEDULES
from stable_diffusion_server.types import ExtraValue

_ZERO_SNR = "rescale_betas_zero_snr"


def configuration(
    scheduler_class: type, like: Any, chosen: Mapping[str, ExtraValue], *, pure: bool
) -> dict[str, object]:
    """The configuration options of a scheduler class for a request's options, for a model whose scheduler is `like`.

    A class that cannot rescale its betas to zero terminal SNR is given betas that are, unless it cannot start in `pure`
    noise.
    """
    known = inspect.signature(scheduler_class.__init__).parameters  # type: ignore[misc]  # of the class itself
    options: dict[str, object] = {}
    zero_snr = chosen.get("zero_snr")
    if zero_snr:
        options["timestep_spacing"] = "trailing"
    options |= SCHEDULES.get(str(chosen.get("schedule", "")), {})
    if "solver_order" in chosen:
        options["solver_order"] = chosen["solver_order"]
    if "shift" in chosen:
        options |= {"shift": chosen["shift"], "use_dynamic_shifting": False}
    if zero_snr is not None:
        options[_ZERO_SNR] = zero_snr
    elif like.config.get(_ZERO_SNR) and not isinstance(like, scheduler_class):
        options[_ZERO_SNR] = True
    if pure and options.get(_ZERO_SNR) and _ZERO_SNR not in known and "trained_betas" in known:
        options["trained_betas"] = _zero_snr_betas(like.config)
    return {name: value for name, value in options.items() if name in known}


def _zero_snr_betas(config: Mapping[str, object]) -> list[float]:
    """Betas whose last noise level is that of diffusers' Euler with zero terminal SNR, finite: σ is 4096."""
    kept = EulerDiscreteScheduler.from_config(config, **{_ZERO_SNR: True}).alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    betas: list[float] = (1 - kept / before).tolist()
    return betas


def aligned_timesteps(scheduler: Any, steps: int, *, sdxl: bool) -> list[int]:
    """The timesteps of "Align Your Steps" for SDXL or SD 1.5.

    The table has ten. For other counts its noise levels are interpolated by their logarithms, as its authors say.
    """
    model = "StableDiffusionXL" if sdxl else "StableDiffusion"
    table: list[int] = AysSchedules[f"{model}Timesteps"]
    if steps == len(table):
        return table
    levels = np.log(AysSchedules[f"{model}Sigmas"][:-1])
    wanted = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(levels)), levels)
    kept = scheduler.alphas_cumprod.double().numpy()
    trained = np.log(((1 - kept) / kept) ** 0.5)
    found = [round(float(time)) for time in np.interp(wanted, trained, np.arange(len(trained)))]
    for number in range(1, len(found)):  # a level twice would be a step of no length
        found[number] = min(found[number], found[number - 1] - 1)
    return found


def has_table(chosen: Mapping[str, ExtraValue]) -> bool:
    """Whether the steps are those of a table."""
    return chosen.get("schedule") == AYS


def use_own_noise(scheduler: Any, like: torch.Tensor, seed: int) -> None:
    """Have a DPM++ SDE scheduler draw the noise of a request from its seed, on the CPU.

    `like` is a tensor of the shape of the latents; the timesteps must be set. Equal to the stock scheduler with
    `noise_sampler_seed`, which draws on the device of the latents.
    """
    if not isinstance(scheduler, DPMSolverSDEScheduler):
        return
    levels = scheduler.sigmas[scheduler.sigmas > 0]
    least, most = levels.min(), levels.max()
    sampler = BrownianTreeNoiseSampler(like.cpu(), least, most, seed % 2**32)

    def noise(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        # Its noise levels went through a logarithm and are a rounding beyond the tree.
        drawn: torch.Tensor = sampler(start.clamp(least, most), end.clamp(least, most))
        return drawn.to(like.device)

    scheduler.noise_sampler = noise


def follow(scheduler: Any, donor: Any) -> None:
    """Give a flow-matching Heun scheduler the noise levels of an Euler one, each but the first and the last twice."""
    sigmas, times = donor.sigmas, donor.timesteps
    scheduler.num_inference_steps = len(times)
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
