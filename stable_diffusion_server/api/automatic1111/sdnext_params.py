"""SD.Next's parameters of a scheduler: those that have an equal here, and sentences about the others.

Facts: `modules/sd_samplers_diffusers.py` and `test/test-samplers-api.py` of SD.Next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_diffusion_server.api.automatic1111.sampler_names import ChosenSampler, is_known, means_default
from stable_diffusion_server.api.automatic1111.sampling_params import Sampling, is_sent, number_of, option_fault
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import ExtraValue

# Whether what a scheduler does not take is left out; false: it is refused.
FALLBACK = "schedulers_fallback"
_PREFIX = "schedulers_"
# Parameters that one answer names.
_MOST_NAMED = 20
_SIGMA, _SPACING, _ORDER = "schedulers_sigma", "schedulers_timestep_spacing", "schedulers_solver_order"
_SHIFT, _DYNAMIC, _ZERO_SNR = "schedulers_shift", "schedulers_dynamic_shift", "schedulers_rescale_betas"
_PREDICTION, _BETAS = "schedulers_prediction_type", "schedulers_beta_schedule"
_SIGMAS = {"karras": "Karras", "betas": "Beta", "beta": "Beta", "exponential": "Exponential"}
_SPACINGS = {"linspace": "Normal", "leading": "DDIM", "trailing": "SGM Uniform"}
# Values that clients send to every sampler.
_USUAL: Mapping[str, tuple[object, ...]] = {
    _SIGMA: ("default",),
    _SPACING: ("default",),
    _ORDER: (0,),
    _SHIFT: (0, 3),
    _DYNAMIC: (False,),
    _ZERO_SNR: (False,),
    _PREDICTION: ("default",),
    _BETAS: ("default", "scaled_linear"),
    "schedulers_base_shift": (0.5,),
    "schedulers_max_shift": (1.15,),
    "schedulers_use_loworder": (True,),
    "schedulers_use_thresholding": (False,),
    "schedulers_beta_start": (0,),
    "schedulers_beta_end": (0,),
    "schedulers_timesteps_range": (1000,),
    "schedulers_timesteps": (),
    "uni_pc_variant": ("bh2",),
}


def is_scheduler_parameter(name: str) -> bool:
    """Whether a parameter is one that this module reads."""
    return name in _USUAL or name.startswith(_PREFIX)


def schedule_of(extra: Mapping[str, Any]) -> str:
    """Return the schedule that the parameters ask for, by AUTOMATIC1111's name; empty if they leave it open."""
    by_level = _SIGMAS.get(str(extra.get(_SIGMA))[:50].lower(), "")
    return by_level or _SPACINGS.get(str(extra.get(_SPACING))[:50].lower(), "")


def read_scheduler_parameters(
    extra: Mapping[str, Any], settings: Mapping[str, Any], asked: str, chosen: ChosenSampler, spec: ModelSpec
) -> tuple[Sampling, list[str]]:
    """Return options for the sampler `chosen`, of the name `asked`, and a sentence on each parameter without effect.

    Raises `InvalidInput` as SD.Next does: for an unknown sampler where `schedulers_fallback` is sent, and where it is
    false for whatever the sampler or the model does not take, all of it named.
    """
    taken: dict[str, ExtraValue] = {}
    faults = _fixed_faults(extra, chosen, spec)
    flow = _is_flow(chosen, spec)
    options = {"solver_order": _ORDER, "zero_snr": _ZERO_SNR}
    if flow and extra.get(_DYNAMIC) is not True:
        options["shift"] = _SHIFT
    for ours, theirs in options.items():
        value = number_of(extra.get(theirs))
        usual = _USUAL[theirs] if ours != "shift" else (0,)
        if value is None or value in usual:
            continue
        if isinstance(value, float) and value.is_integer() and ours == "solver_order":
            value = int(value)
        if why := option_fault(ours, value, chosen, spec, taken):
            faults.append((theirs, why))
        else:
            taken[ours] = value
    fallback = settings.get(FALLBACK)
    if isinstance(fallback, bool):
        faults = _refused(faults, asked, chosen, spec, strict=not fallback)
    return tuple(taken.items()), [f"{name}: {sentence}" for name, sentence in faults]


def _fixed_faults(extra: Mapping[str, Any], chosen: ChosenSampler, spec: ModelSpec) -> list[tuple[str, str]]:
    """Return what has no equal here, or has it by the model alone."""
    flow, faults = _is_flow(chosen, spec), []
    usual = {**_USUAL, _PREDICTION: ("default", _prediction_of(spec, flow=flow))}
    for name, value in extra.items():
        if not is_scheduler_parameter(name) or not is_sent(value) or value in usual.get(name, ()):
            continue
        if name in (_ORDER, _ZERO_SNR) or (name == _SHIFT and flow):
            continue
        if name == _DYNAMIC and flow:  # the model's own shift is taken
            continue
        if (name == _SIGMA and str(value)[:50].lower() in _SIGMAS) or (
            name == _SPACING and str(value)[:50].lower() in _SPACINGS
        ):
            continue
        faults.append((name[:50], f"{_shown(value)} is not offered for {spec.name}."))
    return faults


def _refused(
    faults: list[tuple[str, str]], asked: str, chosen: ChosenSampler, spec: ModelSpec, *, strict: bool
) -> list[tuple[str, str]]:
    """Return the faults if they may be left out. Raises `InvalidInput` for those that may not."""
    refused = list(faults) if strict else []
    if not is_known(asked, spec):
        refused.append(("sampler_name", f"{asked[:100]!r} is not a sampler here."))
    elif strict and not means_default(asked):
        refused += [("sampler_name", sentence) for sentence in chosen.ignored]
    if refused:
        raise InvalidInput.from_faults([(name, f"{name}: {sentence}") for name, sentence in refused[:_MOST_NAMED]])
    return faults


def _is_flow(chosen: ChosenSampler, spec: ModelSpec) -> bool:
    return (chosen.scheduler or spec.default_scheduler).startswith("flow_")


def _prediction_of(spec: ModelSpec, *, flow: bool) -> str:
    """Return the kind of prediction, by SD.Next's name."""
    if flow:
        return "flow_prediction"
    return (spec.checkpoint.prediction if spec.checkpoint else "") or "epsilon"


def _shown(value: object) -> str:
    return repr(value)[:50] if isinstance(value, str | bool | int | float) else "a value of that kind"
