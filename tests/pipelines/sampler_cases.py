"""The samplers with the diffusers scheduler that is their oracle, written out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FLAGS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
# Schedule → what it is in diffusers.
SCHEDULES: dict[str, dict[str, Any]] = {
    "": {},
    "normal": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "ddim_uniform": {"timestep_spacing": "leading", "steps_offset": 1},
    "ays": {"timestep_spacing": "linspace"},
}
# NVIDIA's ten timesteps for SDXL.
ALIGNED = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
MULTISTEP, LATENTS = "DPMSolverMultistepScheduler", {"clip_sample": False}


@dataclass(frozen=True)
class Sampler:
    """The scheduler class of diffusers, its configuration, and the schedules to draw with."""

    stock: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ("", "karras")


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler("EulerDiscreteScheduler", schedules=tuple(SCHEDULES)),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", schedules=("", "normal", "ddim_uniform")),
    "heun": Sampler("HeunDiscreteScheduler", schedules=("", "ddim_uniform", "ays")),
    "dpm": Sampler(
        MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}, ("", "exponential")
    ),
    "dpm_2m": Sampler(MULTISTEP, {"algorithm_type": "dpmsolver++"}, ("", "karras", "beta", "ays")),
    "dpm_3m_sde": Sampler(MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, ("", "exponential")),
    "dpm_sde": Sampler("DPMSolverSDEScheduler", {"noise_sampler_seed": 7}),
    "dpm_2s": Sampler("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "lms": Sampler("LMSDiscreteScheduler"),
    "kdpm2": Sampler("KDPM2DiscreteScheduler"),
    "kdpm2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
    "ddim": Sampler("DDIMScheduler", LATENTS, ("", "trailing", "ddim_uniform")),
    "ddpm": Sampler("DDPMScheduler", LATENTS, ("", "normal")),
    "lcm": Sampler("LCMScheduler", LATENTS, ("",)),
    "tcd": Sampler("TCDScheduler", LATENTS, ("",)),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}, ("", "normal")),
}
# What diffusers lacks, with the numbers of forward passes a step.
OWN = {"dpm_2s_a": 2, "er_sde": 1, "euler_a": 1}
CASES = [(name, schedule) for name, sampler in SAMPLERS.items() for schedule in sampler.schedules]
TWO_PASSES = {"heun", "kdpm2", "kdpm2_a", "dpm_sde", "dpm_2s_a", "flow_heun"}
