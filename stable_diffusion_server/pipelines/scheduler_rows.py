"""The rows of the samplers and of the spacings of their steps, and which of a request's options each takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from stable_diffusion_server.pipelines.model_spec import SchedulerSpec

AYS = "ays"
_FLAGS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)

# Spacing of the steps → options of diffusers' schedulers. A class takes those that it has.
SCHEDULES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "normal": {**_FLAGS, "timestep_spacing": "linspace"},
        "karras": {**_FLAGS, "timestep_spacing": "linspace", "use_karras_sigmas": True},
        "exponential": {**_FLAGS, "timestep_spacing": "linspace", "use_exponential_sigmas": True},
        "beta": {**_FLAGS, "timestep_spacing": "linspace", "use_beta_sigmas": True},
        "trailing": {**_FLAGS, "timestep_spacing": "trailing"},
        "ddim_uniform": {**_FLAGS, "timestep_spacing": "leading", "steps_offset": 1},
        # "Align Your Steps" (Sabour et al. 2024, arXiv 2404.14507): a table of timesteps, see `loading/schedules.py`.
        AYS: {**_FLAGS, "timestep_spacing": "linspace"},
    }
)
# Further names of a spacing. SGM's differs from `trailing` by less than one of 1000 timesteps, the simple one by
# rounding.
SCHEDULE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"automatic": "", "uniform": "normal", "simple": "trailing", "sgm_uniform": "trailing", "align_your_steps": AYS}
)

_EVERY = tuple(SCHEDULES)
_WITHOUT_TABLE = tuple(name for name in SCHEDULES if name != AYS)
_BY_TIMESTEP = ("normal", "trailing", "ddim_uniform")
_FLOW = ("karras", "exponential", "beta")
_CHURN = MappingProxyType({"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0})
_ANCESTRAL = MappingProxyType({"eta": 1.0, "s_noise": 1.0})
_NOISE = MappingProxyType({"s_noise": 1.0})
_ETA = MappingProxyType({"eta": 0.0})
_SECOND_ORDER = MappingProxyType({"solver_order": 2})
_THIRD_ORDER = MappingProxyType({"solver_order": 3})
# The default of a shift is the model's own, and equals no number.
_SHIFT = MappingProxyType({"shift": math.nan})
# clip_sample is meant for pixels; on latents it makes images grey.
_LATENTS = MappingProxyType({"clip_sample": False})
# What the ancestral scheduler of diffusers does not read.
_PLAIN_EULER = MappingProxyType(
    {"interpolation_type": "linear", "final_sigmas_type": "zero", "timestep_type": "discrete"}
)


def _dpm(**options: object) -> Mapping[str, object]:
    return MappingProxyType({"algorithm_type": "dpmsolver++", **options})


SCHEDULERS: Mapping[str, SchedulerSpec] = MappingProxyType(
    {
        "euler": SchedulerSpec("EulerDiscreteScheduler", schedules=_EVERY, takes=_CHURN),
        "euler_a": SchedulerSpec("EulerAncestralScheduler", options=_PLAIN_EULER, schedules=_EVERY, takes=_ANCESTRAL),
        "ddim": SchedulerSpec("DDIMScheduler", options=_LATENTS, schedules=_BY_TIMESTEP, takes=_ETA),
        # LCM was distilled on 50 steps and selects among them.
        "lcm": SchedulerSpec("LCMScheduler", max_steps=50, options=_LATENTS),
        "dpm": SchedulerSpec(
            "DPMSolverMultistepScheduler",
            options=_dpm(algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"),
            schedules=_EVERY,
            takes=_SECOND_ORDER,
        ),
        "unipc": SchedulerSpec("UniPCMultistepScheduler", schedules=_WITHOUT_TABLE, takes=_SECOND_ORDER),
        "flow_euler": SchedulerSpec("FlowMatchEulerDiscreteScheduler", schedules=_FLOW, takes=_SHIFT),
        # The one of the model's folder, of any class.
        "own": SchedulerSpec(""),
        "heun": SchedulerSpec("HeunDiscreteScheduler", schedules=_EVERY, start_pure=False),
        "dpm_2m": SchedulerSpec("DPMSolverMultistepScheduler", options=_dpm(), schedules=_EVERY, takes=_SECOND_ORDER),
        "dpm_3m_sde": SchedulerSpec(
            "DPMSolverMultistepScheduler",
            options=_dpm(algorithm_type="sde-dpmsolver++", solver_order=3),
            schedules=_EVERY,
            takes=_THIRD_ORDER,
        ),
        "dpm_sde": SchedulerSpec("DPMSolverSDEScheduler", schedules=_WITHOUT_TABLE, takes=_NOISE),
        "dpm_2s": SchedulerSpec(
            "DPMSolverSinglestepScheduler",
            options=_dpm(),
            schedules=("normal", "karras", "exponential", "beta", AYS),
            takes=_SECOND_ORDER,
        ),
        "dpm_2s_a": SchedulerSpec("DPM2SAncestralScheduler", schedules=_EVERY, takes=_ANCESTRAL),
        "deis": SchedulerSpec("DEISMultistepScheduler", schedules=_WITHOUT_TABLE, takes=_SECOND_ORDER),
        "lms": SchedulerSpec("LMSDiscreteScheduler", schedules=_WITHOUT_TABLE),
        "kdpm2": SchedulerSpec("KDPM2DiscreteScheduler", schedules=_WITHOUT_TABLE, start_pure=False),
        "kdpm2_a": SchedulerSpec("KDPM2AncestralDiscreteScheduler", schedules=_WITHOUT_TABLE, start_pure=False),
        "ddpm": SchedulerSpec("DDPMScheduler", options=_LATENTS, schedules=_BY_TIMESTEP),
        "tcd": SchedulerSpec("TCDScheduler", max_steps=50, options=_LATENTS, takes=_ETA),
        "pndm": SchedulerSpec(
            "PNDMScheduler", options=MappingProxyType({"skip_prk_steps": True}), schedules=_BY_TIMESTEP
        ),
        "er_sde": SchedulerSpec("ErSdeScheduler", schedules=_EVERY, takes=_NOISE),
        "flow_heun": SchedulerSpec(
            "FlowMatchHeunDiscreteScheduler", schedules=_FLOW, takes=MappingProxyType({**_CHURN, **_SHIFT})
        ),
    }
)

# The samplers of a model that predicts noise or velocity over 1000 timesteps, and those of a flow.
FOR_NOISE: tuple[str, ...] = tuple(name for name in SCHEDULERS if name != "own" and not name.startswith("flow_"))
FOR_FLOWS: tuple[str, ...] = tuple(name for name in SCHEDULERS if name.startswith("flow_"))
