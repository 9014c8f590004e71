"""Maps AUTOMATIC1111's names of samplers and parameters to ours, and reads LoRA tags from its prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping

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


_TAG = re.compile(r"<([^<>]*)>")
_NAME_AND_WEIGHT = re.compile(r"(?P<name>[^:]+)(:(?P<weight>[+-]?\d{0,3}(\.\d{1,6})?))?(:.*)?", re.DOTALL)
_IN_PARENTHESES = re.compile(r"\(([^()]*)\)")
_IN_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_WEIGHT = re.compile(r"\d+(\.\d+)?")
_BLANKS = re.compile(r"\s{2,}")
_DIGITS = frozenset("0123456789.")
_OTHER_NETWORKS = ("lyco:", "hypernet:")

Lora = tuple[str, float]


def extract_loras(prompt: str) -> tuple[str, tuple[Lora, ...]]:
    """Return the prompt without `<lora:name:weight>` and other networks, and the LoRAs."""
    found: list[Lora] = []

    def extract(tag: re.Match[str]) -> str:
        if tag[1].startswith(_OTHER_NETWORKS):
            return ""
        lora = _lora_in(tag[1])
        if lora is None:
            return tag[0]
        found.append(lora)
        return ""

    words = _TAG.sub(extract, prompt)
    return _BLANKS.sub(" ", words).strip(" ,"), tuple(found)


def ignored_syntax(prompt: str) -> list[str]:
    """Return sentences about syntax that AUTOMATIC1111 supports and this server ignores."""
    ignored = []
    if any(tag[1].startswith(_OTHER_NETWORKS) for tag in _TAG.finditer(prompt)):
        ignored.append("prompt: only <lora:…> is known here; other networks are left out.")
    weighted = any(_is_weighted(group[1]) for group in _IN_PARENTHESES.finditer(prompt))
    if weighted or any(_is_scheduled(group[1]) for group in _IN_BRACKETS.finditer(prompt)):
        ignored.append("prompt: weights in brackets are read as plain words.")
    return ignored


def _lora_in(tag: str) -> Lora | None:
    """Return the LoRA of a tag such as `lora:name:0.8`."""
    if not tag.startswith("lora:"):
        return None
    match = _NAME_AND_WEIGHT.fullmatch(tag.removeprefix("lora:"))
    return (match["name"].strip(), _number(match["weight"])) if match else None


def _is_weighted(inside: str) -> bool:
    """Return whether the text has a weight, as in `(red:1.3)`."""
    _, colon, weight = inside.rpartition(":")
    return bool(colon) and _WEIGHT.fullmatch(weight.strip()) is not None


def _is_scheduled(inside: str) -> bool:
    """Return whether the text is prompt editing, as in `[cat:dog:0.5]`."""
    words, _, when = inside.rpartition(":")
    return bool(when) and set(when) <= _DIGITS and ":" in words[1:-1]


def _number(weight: str | None) -> float:
    try:
        return float(weight or 1)
    except ValueError:
        return 1.0
