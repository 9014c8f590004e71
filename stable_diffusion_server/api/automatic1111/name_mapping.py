"""AUTOMATIC1111's names for what has other names here: samplers, models, parameters in errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.errors import InvalidInput, ServerError
from stable_diffusion_server.pipelines import ModelSpec

# Our schedulers under AUTOMATIC1111's names, the closest first; what ends in Karras is looked up without it.
SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "Euler": ("euler", "flow_euler"),
    "Euler a": ("euler_a",),
    "DDIM": ("ddim",),
    "LCM": ("lcm",),
    "DPM++ 2M": ("dpm",),
    "DPM++ 2M SDE": ("dpm",),
    "DPM++ SDE": ("dpm",),
    "DPM++ 2S a": ("dpm",),
    "DPM++ 3M SDE": ("dpm",),
    "DPM2": ("dpm",),
    "DPM2 a": ("euler_a",),
    "Heun": ("euler",),
    "LMS": ("euler",),
    "UniPC": ("unipc",),
    "PLMS": ("ddim",),
    "DDPM": ("ddim",),
}
_EXACT = {"Euler", "Euler a", "DDIM", "LCM", "DPM++ 2M SDE", "UniPC"}
_BY_LOWER = {name.lower(): name for name in SAMPLERS}
_SCHEDULES = {"", "automatic", "none", "uniform", "normal", "simple"}
_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "scheduler": "sampler_name",
    "lora": "prompt",
    "feather": "mask_blur",
    "model": "override_settings",
}
_OUR_WORDS = re.compile("|".join(rf"\b{ours}\b" for ours in _FIELDS if ours not in ("model", "lora")))


# Parameters that have bounds, with ours they are bounded by.
BOUNDED = {theirs: ours for ours, theirs in _FIELDS.items() if ours not in ("scheduler", "lora", "model")}


def scheduler_for(sampler: str, schedule: str, facts: ModelSpec) -> tuple[str | None, str | None]:
    """Our scheduler for a sampler and its schedule, and a sentence where it is not quite that one.

    Raises `InvalidInput` for a name that is no sampler's.
    """
    if not sampler:
        return None, None
    plain = sampler.strip()
    if plain in facts.schedulers:
        return plain, None
    lowered = plain.lower().removesuffix(" karras")
    name = _BY_LOWER.get(lowered)
    if name is None:
        raise InvalidInput(
            f"{sampler[:100]!r} is not a sampler here; there are {', '.join(SAMPLERS)}.", field="sampler_name"
        )
    ours = next((one for one in SAMPLERS[name] if one in facts.schedulers), None)
    taken = ours or facts.default_scheduler
    spaced = lowered != plain.lower() or schedule.strip().lower() not in _SCHEDULES
    if ours is None or name not in _EXACT or spaced:
        return taken, f"{plain[:100]} is drawn by {taken}{', without its spacing of steps' if spaced else ''}."
    return taken, None


def samplers_of(models: Mapping[str, ModelSpec]) -> list[str]:
    """The samplers that are drawn as what they are."""
    here = {scheduler for facts in models.values() for scheduler in facts.schedulers}
    return [name for name in SAMPLERS if name in _EXACT and here & set(SAMPLERS[name])]


def title_of(facts: ModelSpec) -> str:
    """What AUTOMATIC1111's clients show a model as."""
    return f"{facts.name} [{facts.revision}]"


def model_named(name: str, house: DialectContext) -> str:
    """Our name of a model by any of its names: title, name, folder or alias. Raises `InvalidInput`."""
    wanted = name.strip().lower()
    for facts in house.models.values():
        if wanted in {title_of(facts).lower(), facts.name, facts.folder.lower(), facts.revision.lower()}:
            return facts.name
    try:
        return house.facts(name.strip()).name
    except InvalidInput as error:
        raise InvalidInput(f"sd_model_checkpoint: {error.detail}", field="override_settings") from error


def renamed(error: ServerError) -> ServerError:
    """The error with our parameters under AUTOMATIC1111's names."""
    if error.field not in _FIELDS:
        return error
    detail = _OUR_WORDS.sub(lambda match: _FIELDS[match[0]], error.detail)
    faults = [
        (_FIELDS.get(field, field), _OUR_WORDS.sub(lambda m: _FIELDS[m[0]], told)) for field, told in error.faults
    ]
    return type(error)(detail, field=_FIELDS[error.field], faults=faults, retry_after=error.retry_after)
