"""Maps AUTOMATIC1111's names of samplers, models and parameters to those of this server."""

from __future__ import annotations

import re
from collections.abc import Mapping

from stable_diffusion_server.api.dialect_context import DialectContext
from stable_diffusion_server.errors import InvalidInput, ServerError
from stable_diffusion_server.pipelines import ModelSpec

# Schedulers of this server by AUTOMATIC1111's names, closest first. The lookup ignores a final "Karras" in a name.
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
_OUR_NAMES = re.compile("|".join(rf"\b{ours}\b" for ours in _FIELDS if ours not in ("model", "lora")))


# AUTOMATIC1111's parameters with bounds → the parameters of this server with the same bounds.
BOUNDED = {theirs: ours for ours, theirs in _FIELDS.items() if ours not in ("scheduler", "lora", "model")}


def scheduler_for(sampler: str, schedule: str, spec: ModelSpec) -> tuple[str | None, str | None]:
    """Return the scheduler for a sampler and its schedule, and a warning sentence if the match is not exact.

    Raises `InvalidInput` for an unknown sampler.
    """
    if not sampler:
        return None, None
    plain = sampler.strip()
    if plain in spec.schedulers:
        return plain, None
    lowered = plain.lower().removesuffix(" karras")
    name = _BY_LOWER.get(lowered)
    if name is None:
        raise InvalidInput(
            f"{sampler[:100]!r} is not a sampler here; there are {', '.join(SAMPLERS)}.", field="sampler_name"
        )
    ours = next((one for one in SAMPLERS[name] if one in spec.schedulers), None)
    taken = ours or spec.default_scheduler
    spaced = lowered != plain.lower() or schedule.strip().lower() not in _SCHEDULES
    if ours is None or name not in _EXACT or spaced:
        return taken, f"{plain[:100]} is drawn by {taken}{', without its spacing of steps' if spaced else ''}."
    return taken, None


def samplers_of(models: Mapping[str, ModelSpec]) -> list[str]:
    """Return the samplers that have an exact counterpart."""
    here = {scheduler for spec in models.values() for scheduler in spec.schedulers}
    return [name for name in SAMPLERS if name in _EXACT and here & set(SAMPLERS[name])]


def title_of(spec: ModelSpec) -> str:
    """Return the title of a model in AUTOMATIC1111's clients."""
    return f"{spec.name} [{spec.revision}]"


def model_named(name: str, context: DialectContext) -> str:
    """Return the name of a model by its title, name, folder, revision or alias. Raises `InvalidInput`."""
    wanted = name.strip().lower()
    for spec in context.models.values():
        if wanted in {title_of(spec).lower(), spec.name, spec.folder.lower(), spec.revision.lower()}:
            return spec.name
    try:
        return context.model(name.strip()).name
    except InvalidInput as error:
        raise InvalidInput(f"sd_model_checkpoint: {error.detail}", field="override_settings") from error


def renamed(error: ServerError) -> ServerError:
    """Return the error with AUTOMATIC1111's parameter names."""
    if error.field not in _FIELDS:
        return error
    detail = _OUR_NAMES.sub(lambda match: _FIELDS[match[0]], error.detail)
    faults = [
        (_FIELDS.get(field, field), _OUR_NAMES.sub(lambda m: _FIELDS[m[0]], sentence))
        for field, sentence in error.faults
    ]
    return type(error)(detail, field=_FIELDS[error.field], faults=faults, retry_after=error.retry_after)
