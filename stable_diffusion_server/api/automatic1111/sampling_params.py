"""AUTOMATIC1111's options of a sampler: those that a scheduler here takes, and sentences about the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_diffusion_server.api.automatic1111.sampler_names import ChosenSampler
from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines import ModelSpec, resolve_sampling
from stable_diffusion_server.types import ExtraValue

Sampling = tuple[tuple[str, ExtraValue], ...]

# AUTOMATIC1111's and SD.Next's names → ours, and the values that clients send to any sampler by default.
SAMPLING_PARAMETERS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "eta": ("eta", (0, 1)),
    "s_churn": ("s_churn", (0,)),
    "s_tmin": ("s_tmin", (0, -1)),
    "s_tmax": ("s_tmax", (0, -1)),
    "s_noise": ("s_noise", (0, 1)),
    "guidance_rescale": ("guidance_rescale", (0,)),
    "diffusers_guidance_rescale": ("guidance_rescale", (0,)),
    "zero_snr": ("zero_snr", (False,)),
    "subseed_strength": ("subseed_strength", (0,)),
}
_LONGEST = 50


def read_sampling(extra: Mapping[str, Any], chosen: ChosenSampler, spec: ModelSpec) -> tuple[Sampling, list[str]]:
    """Return the options for the chosen sampler, and a sentence about each value that it does not take.

    A number may be a text, as elsewhere in this dialect.
    """
    taken: dict[str, ExtraValue] = {"schedule": chosen.schedule} if chosen.schedule else {}
    ignored = []
    for theirs, (ours, usual) in SAMPLING_PARAMETERS.items():
        value = number_of(extra.get(theirs))
        if value is None or (ours == "s_tmax" and value in usual):  # 0 is no bound there
            continue
        why = option_fault(ours, value, chosen, spec, taken)
        if why:
            ignored += [] if value in usual else [f"{theirs}: {why}"]
        else:
            taken[ours] = value
    return tuple(taken.items()), ignored


def option_fault(
    name: str, value: ExtraValue, chosen: ChosenSampler, spec: ModelSpec, taken: Mapping[str, ExtraValue]
) -> str:
    """Why the chosen sampler does not take an option beside those it has `taken`; empty if it does."""
    scheduler = chosen.scheduler or spec.default_scheduler
    try:
        # Churn's options are checked together.
        resolve_sampling(spec, scheduler, spec.default_steps, [*taken.items(), (name, value)])
    except InvalidInput as error:
        return error.faults[0][1]
    return ""


def is_sent(value: object) -> bool:
    """Whether a value says anything."""
    return isinstance(value, bool | int | float) or value not in (None, "", [], {})


def number_of(value: object) -> ExtraValue | None:
    """Return a number or a boolean; what is neither as a text, which is refused by name; `None` if nothing is sent."""
    if isinstance(value, bool | int | float) or not is_sent(value):
        return value if isinstance(value, bool | int | float) else None
    text = str(value)[:_LONGEST] if isinstance(value, str) else "not a number"
    try:
        return float(text)
    except ValueError:
        return text
