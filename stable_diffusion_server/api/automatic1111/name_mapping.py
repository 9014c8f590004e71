"""Maps AUTOMATIC1111's names of samplers and parameters to ours, and reads LoRA tags from its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from stable_diffusion_server.errors import ServerError
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
_BY_WORDS = {name.lower().replace("++", ""): name for name in SAMPLERS}
# Spacings of the steps that a sampler's name may end with. The first two words mean no other spacing than usual.
_USUAL_SCHEDULES = frozenset({"", "automatic", "none", "uniform", "normal", "simple", "default"})
_SCHEDULES = (
    *("polyexponential", "exponential", "karras", "sgm uniform", "ddim uniform", "uniform", "automatic", "simple"),
    *("normal", "beta", "turbo", "align your steps", "kl optimal", "linear quadratic"),
)
# Words in unknown names → the sampler that is closest, most specific first.
_CLOSEST = (
    *((word, "Euler a") for word in ("euler a", "euler ancestral", "euler dy", "dpm2 a", "dpm 2 a", "dpm2 ancestral")),
    *((word, "Euler") for word in ("euler", "heun", "lms", "flux", "flow", "dpm2", "dpm 2", "er sde", "sa solver")),
    *((word, "DPM++ 2M SDE") for word in ("dpm", "restart", "deis", "ipndm", "res multistep", "gradient estimation")),
    *((word, "LCM") for word in ("lcm", "tcd", "hyper", "lightning")),
    *((word, "UniPC") for word in ("unipc", "uni pc")),
    *((word, "DDIM") for word in ("ddim", "ddpm", "plms", "pndm")),
)
_NOT_IN_NAMES = re.compile(r"\[[^\[\]]*\]|[^a-z0-9]+")
_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "hires_width": "hr_resize_x",
    "hires_height": "hr_resize_y",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "canny": "alwayson_scripts",
    "canny_low": "alwayson_scripts",
    "canny_high": "alwayson_scripts",
    "control_scale": "alwayson_scripts",
    "scheduler": "sampler_name",
    "lora": "prompt",
    "feather": "mask_blur",
    "model": "override_settings",
}
_OUR_NAMES = re.compile("|".join(rf"\b{ours}\b" for ours in _FIELDS if ours not in ("model", "lora", "canny")))


# AUTOMATIC1111's parameters with bounds → the parameters of this server with the same bounds.
BOUNDED = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "mask_blur": "feather",
}


def scheduler_for(sampler: str, schedule: str, spec: ModelSpec) -> tuple[str | None, str | None]:
    """Return the scheduler closest to a sampler and its schedule, and a warning sentence if the match is not exact."""
    if not sampler:
        return None, None
    plain = sampler.strip()
    if plain in spec.schedulers:
        return plain, None
    name, spaced = _sampler_named(plain)
    ours = next((one for one in SAMPLERS.get(name, ()) if one in spec.schedulers), None)
    taken = ours or spec.default_scheduler
    spaced = spaced or schedule.strip().lower() not in _USUAL_SCHEDULES
    exact = ours is not None and name in _EXACT and plain.lower() == name.lower()
    if exact and not spaced:
        return taken, None
    return taken, f"{plain[:100]} is drawn by {taken}{', without its spacing of steps' if spaced else ''}."


def _sampler_named(name: str) -> tuple[str, bool]:
    """Return the closest sampler, empty if no word of the name is known, and whether it names a spacing of steps."""
    lowered = name.lower()
    spaced = False
    if lowered not in _BY_LOWER:
        words = _NOT_IN_NAMES.sub(" ", lowered.replace("++", "pp")).split()
        lowered = " ".join(word.replace("dpmpp", "dpm") for word in (words[1:] if words[:1] == ["k"] else words))
        ending = next((ending for ending in _SCHEDULES if f" {lowered}".endswith(f" {ending}")), "")
        lowered, spaced = lowered.removesuffix(ending).strip(), ending not in _USUAL_SCHEDULES
    listed = _BY_LOWER.get(lowered) or _BY_WORDS.get(lowered)
    close = (sampler for word, sampler in _CLOSEST if f" {word}" in f" {lowered} ")
    return listed or next(close, ""), spaced


def samplers_of(models: Mapping[str, ModelSpec]) -> list[str]:
    """Return the samplers that have an exact counterpart."""
    here = {scheduler for spec in models.values() for scheduler in spec.schedulers}
    return [name for name in SAMPLERS if name in _EXACT and here & set(SAMPLERS[name])]


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
