"""The options of a sampler that a request may have: their ranges, and which of them a model's scheduler takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from stable_diffusion_server.errors import InvalidInput, number_text
from stable_diffusion_server.pipelines.catalog import scheduler_of
from stable_diffusion_server.pipelines.model_spec import ModelSpec, SchedulerSpec
from stable_diffusion_server.pipelines.scheduler_rows import AYS, SCHEDULE_ALIASES, SCHEDULES
from stable_diffusion_server.types import SEED_MAX, ExtraValue

Sampling = Sequence[tuple[str, ExtraValue]]

# "Align Your Steps" has ten noise levels; interpolated for more steps than this, they would be one timestep apart.
_MOST_OF_TABLE = 100
# Noise that only churning adds.
_OF_CHURN = ("s_noise", "s_tmax", "s_tmin")
_WHOLE = ("subseed", "solver_order")
# Whose numbers a picture starts from; the first is the default.
NOISE_SOURCES = ("cpu", "gpu")


@dataclass(frozen=True, slots=True)
class SamplingOption:
    """An option with a number: its range, both ends included."""

    low: float
    high: float


SAMPLING_NUMBERS: Mapping[str, SamplingOption] = MappingProxyType(
    {
        "eta": SamplingOption(0, 1),
        "s_churn": SamplingOption(0, 100),
        "s_tmin": SamplingOption(0, 10_000),
        "s_tmax": SamplingOption(0, 10_000),
        "s_noise": SamplingOption(0, 2),
        "guidance_rescale": SamplingOption(0, 1),
        "solver_order": SamplingOption(1, 3),
        "shift": SamplingOption(0.1, 100),
        "subseed": SamplingOption(0, SEED_MAX),
        "subseed_strength": SamplingOption(0, 1),
    }
)
SAMPLING_OPTIONS = ("schedule", "zero_snr", "noise_source", *SAMPLING_NUMBERS)


def schedule_named(name: str) -> str:
    """The spacing of a name or alias, empty for the sampler's own, as it is for any name that is not known."""
    plain = name.strip().lower().replace(" ", "_").replace("-", "_")
    return SCHEDULE_ALIASES.get(plain, plain)


def resolve_sampling(
    spec: ModelSpec, scheduler: str, steps: int, asked: Sampling
) -> tuple[tuple[str, ExtraValue], ...]:
    """The options that differ from the scheduler's defaults, sorted by name, with a schedule by its own name.

    Raises `InvalidInput` that names every option which the model or its scheduler does not take, or whose value is of
    another type or out of its range.
    """
    row = scheduler_of(spec, scheduler, steps)
    values = dict(asked)
    if isinstance(values.get("schedule"), str):
        values["schedule"] = schedule_named(str(values["schedule"]))
    values = {name: value for name, value in values.items() if name != "schedule" or value != ""}
    if not values.get("subseed_strength"):  # without it the subseed is of no use
        values = {name: value for name, value in values.items() if not name.startswith("subseed")}
    faults = [
        (name, sentence)
        for name, value in values.items()
        if (sentence := _fault(name, value, spec, scheduler, row, steps))
    ]
    if "s_churn" in row.takes and not values.get("s_churn"):
        faults += [(name, f"{name} has a use only with s_churn above 0.") for name in _OF_CHURN if name in values]
    if faults:
        raise InvalidInput.from_faults(faults)
    return tuple(sorted((name, value) for name, value in values.items() if value != _default(name, spec, row)))


def _default(name: str, spec: ModelSpec, row: SchedulerSpec) -> ExtraValue | None:
    of_model: dict[str, ExtraValue] = {"guidance_rescale": spec.guidance_rescale, "noise_source": NOISE_SOURCES[0]}
    return of_model.get(name, row.takes.get(name))


def _fault(name: str, value: ExtraValue, spec: ModelSpec, scheduler: str, row: SchedulerSpec, steps: int) -> str:
    """Why the scheduler cannot be given this; empty if it can."""
    if name == "schedule":
        return _schedule_fault(value, scheduler, row, steps)
    if name not in SAMPLING_OPTIONS:
        return f"{name[:50]} is not an option of a sampler."
    if name in ("zero_snr", "guidance_rescale"):
        if spec.denoiser_part != "unet" or spec.any_extra:
            return f"{spec.name} has no use for {name}."
    elif name == "noise_source" or name.startswith("subseed"):
        if spec.any_extra:
            return f"{spec.name} draws its noise itself and takes no {name}."
    elif name not in row.takes:
        others = ", ".join(row.takes)
        return f"The scheduler {scheduler} takes no {name}" + (f"; it takes {others}." if others else ".")
    if name == "noise_source":
        return "" if value in NOISE_SOURCES else f"noise_source must be {' or '.join(NOISE_SOURCES)}."
    if name == "zero_snr":
        if value is True and not row.start_pure:
            return f"The scheduler {scheduler} cannot start in pure noise."
        return "" if isinstance(value, bool) else "zero_snr must be true or false."
    option = SAMPLING_NUMBERS[name]
    if name in _WHOLE and not isinstance(value, int):
        return f"{name} must be a whole number."
    if isinstance(value, bool | str) or not math.isfinite(value) or not option.low <= value <= option.high:
        return f"{name} must be between {number_text(option.low)} and {number_text(option.high)}."
    return ""


def _schedule_fault(value: ExtraValue, scheduler: str, row: SchedulerSpec, steps: int) -> str:
    if value not in row.schedules:
        names = ", ".join(("automatic", *row.schedules))
        what = "has no schedule" if value in SCHEDULES else "knows no schedule"
        return f"The scheduler {scheduler} {what} {str(value)[:50]!r}; it has {names}."
    if value == AYS and steps > _MOST_OF_TABLE:
        return f"The schedule {AYS} takes up to {_MOST_OF_TABLE} steps."
    return ""
