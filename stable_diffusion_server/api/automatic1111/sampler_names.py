"""Maps names of samplers and of schedules, as AUTOMATIC1111, ComfyUI and InvokeAI have them, to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stable_diffusion_server.pipelines import SCHEDULERS, SCHEDULES, ModelSpec, schedule_named

# Schedulers of this server by AUTOMATIC1111's names, closest first.
SAMPLERS: Mapping[str, tuple[str, ...]] = {
    "Euler": ("euler", "flow_euler"),
    "Euler a": ("euler_a",),
    "DDIM": ("ddim",),
    "LCM": ("lcm",),
    "DPM++ 2M": ("dpm_2m", "dpm"),
    "DPM++ 2M SDE": ("dpm",),
    "DPM++ SDE": ("dpm_sde", "dpm"),
    "DPM++ 2S": ("dpm_2s", "dpm"),
    "DPM++ 2S a": ("dpm_2s_a", "dpm"),
    "DPM++ 3M SDE": ("dpm_3m_sde", "dpm"),
    "DPM2": ("kdpm2", "dpm"),
    "DPM2 a": ("kdpm2_a", "euler_a"),
    "Heun": ("heun", "flow_heun", "euler"),
    "LMS": ("lms", "euler"),
    "UniPC": ("unipc",),
    "PLMS": ("pndm", "ddim"),
    "DDPM": ("ddpm", "ddim"),
    "DEIS": ("deis", "dpm"),
    "TCD": ("tcd", "lcm"),
    "ER SDE": ("er_sde", "euler"),
}
# AUTOMATIC1111 1.9 and later: the schedule of a sampler where a client leaves it to the sampler.
_AUTOMATIC: Mapping[str, str] = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "karras") | {
    "DPM++ 3M SDE": "exponential"
}
_BY_LOWER = {name.lower(): name for name in SAMPLERS}
# Names of ComfyUI and of InvokeAI, whose ending `_k` is Karras, that are exactly one of these.
_OF_OTHERS: Mapping[str, str] = {
    "euler_ancestral": "Euler a",
    "euler_a": "Euler a",
    "dpm_2": "DPM2",
    "kdpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "kdpm_2_a": "DPM2 a",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    **dict.fromkeys(("dpmpp_sde", "dpmpp_sde_gpu"), "DPM++ SDE"),
    "dpmpp_2m": "DPM++ 2M",
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_gpu"), "DPM++ 2M SDE"),
    **dict.fromkeys(("dpmpp_3m", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu"), "DPM++ 3M SDE"),
    **{name.lower().replace(" ", "_"): name for name in SAMPLERS},
    "pndm": "PLMS",
    "uni_pc": "UniPC",
}
# Schedules without an equal → the nearest.
_NEAREST: Mapping[str, str] = {
    "polyexponential": "exponential",
    "kl_optimal": "exponential",
    "turbo": "trailing",
    "linear_quadratic": "normal",
    "align_your_steps_gits": "ays",
    "align_your_steps_11": "ays",
    "align_your_steps_32": "ays",
    "ddim": "ddim_uniform",
}
_SAME = frozenset({"ddim"})
# What leaves the schedule to the sampler; a flow has no other spacing than its usual one by these names.
_AUTOMATIC_NAMES = frozenset({"", "none", "default", "use_same_scheduler"})
_DEFAULT_SAMPLER = frozenset({"", "default", "automatic", "use same sampler"})
_USUAL_OF_FLOWS = frozenset({"normal", "trailing"})
_ENDINGS = (
    *("polyexponential", "exponential", "karras", "sgm uniform", "ddim uniform", "uniform", "automatic", "simple"),
    *("normal", "beta", "turbo", "align your steps", "kl optimal", "linear quadratic"),
)
_BY_WORDS = {name.lower().replace("++", ""): name for name in SAMPLERS}
# Words in unknown names → the sampler that is closest, most specific first.
_CLOSEST = (
    *((word, "Euler a") for word in ("euler a", "euler ancestral", "euler dy")),
    *((word, "DPM2 a") for word in ("dpm2 a", "dpm 2 a", "kdpm 2 a")),
    *((word, "ER SDE") for word in ("er sde", "seeds 2", "seeds 3")),
    *((word, "DPM2") for word in ("dpm2", "dpm 2 ", "kdpm 2")),
    *((word, "DEIS") for word in ("deis",)),
    *((word, "DPM++ 2S a") for word in ("dpm 2s a", "restart")),
    *((word, "DPM++ 3M SDE") for word in ("dpm 3m",)),
    *((word, "DPM++ 2M SDE") for word in ("dpm 2m sde", "sa solver")),
    *((word, "DPM++ SDE") for word in ("dpm sde",)),
    *((word, "DPM++ 2M") for word in ("dpm", "res multistep", "gradient estimation")),
    *((word, "Heun") for word in ("heun",)),
    *((word, "LMS") for word in ("lms", "ipndm")),
    *((word, "Euler") for word in ("euler", "flux", "flow")),
    *((word, "TCD") for word in ("tcd", "hyper")),
    *((word, "LCM") for word in ("lcm", "lightning")),
    *((word, "UniPC") for word in ("unipc", "uni pc")),
    *((word, "DDPM") for word in ("ddpm",)),
    *((word, "PLMS") for word in ("plms", "pndm")),
    *((word, "DDIM") for word in ("ddim",)),
)
_NOT_IN_NAMES = re.compile(r"\[[^\[\]]*\]|[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class ChosenSampler:
    """A scheduler here (`None`: the model's default), its schedule (empty: its own), and sentences on what differs."""

    scheduler: str | None
    schedule: str
    ignored: list[str]


def sampler_for(sampler: str, schedule: str, spec: ModelSpec) -> ChosenSampler:
    """Return what is closest to a sampler and a schedule, by any of their names. Takes linear time for any text."""
    plain = sampler.strip()
    name, ending, exact = _sampler_named(plain)
    if not plain or plain in spec.schedulers:
        ours, exact = plain or None, True
    else:
        ours = next((one for one in SAMPLERS.get(name, ()) if one in spec.schedulers), None)
        exact = exact and ours in SAMPLERS[name][: 1 + (name in ("Euler", "Heun"))]
    taken = ours or spec.default_scheduler
    ignored = [] if exact else [f"{plain[:100]} is drawn by {taken}."]
    wanted = _plain(schedule)
    wanted = _plain(ending) if wanted in _AUTOMATIC_NAMES or wanted == "automatic" else wanted
    if wanted in _AUTOMATIC_NAMES or wanted == "automatic":
        wanted = _AUTOMATIC.get(name, "") if exact and plain not in spec.schedulers else ""
    found = schedule_named(_NEAREST.get(wanted, wanted))
    if not found or (found in _USUAL_OF_FLOWS and taken.startswith("flow_")):
        return ChosenSampler(ours, "", ignored)
    shown = (schedule.strip() or ending)[:50]
    if found not in SCHEDULERS[taken].schedules:
        ignored.append(f"scheduler: {shown or found} is not taken by {taken}, which is drawn with its own spacing.")
        return ChosenSampler(ours, "", ignored)
    if wanted in _NEAREST and wanted not in _SAME:
        ignored.append(f"scheduler: {shown} is drawn as {found}.")
    return ChosenSampler(ours, found, ignored)


def _plain(name: str) -> str:
    return "_".join(name.strip().lower().replace("-", " ").replace("_", " ").split())


def _sampler_named(name: str) -> tuple[str, str, bool]:
    """Return the closest sampler, the schedule that the name ends with, and whether the sampler is exactly that one.

    The sampler is empty if no word of the name is known.
    """
    lowered = name.lower()
    if lowered in _BY_LOWER:
        return _BY_LOWER[lowered], "", True
    karras = lowered.endswith("_k")
    if (known := _OF_OTHERS.get(lowered.removesuffix("_k") if karras else lowered)) is not None:
        return known, "karras" if karras else "", True
    words = _NOT_IN_NAMES.sub(" ", lowered.replace("++", "pp")).split()
    text = " ".join(word.replace("dpmpp", "dpm") for word in (words[1:] if words[:1] == ["k"] else words))
    ending = next((ending for ending in _ENDINGS if f" {text}".endswith(f" {ending}")), "")
    text = text.removesuffix(ending).strip()
    before = lowered.removesuffix(ending).strip() if ending else ""
    listed = _BY_LOWER.get(before) or _BY_LOWER.get(text) or _BY_WORDS.get(text)
    close = (sampler for word, sampler in _CLOSEST if f" {word}" in f" {text} ")
    return listed or next(close, ""), ending, listed is not None


def is_known(sampler: str, spec: ModelSpec) -> bool:
    """Whether a name, or a word in it, is that of a sampler."""
    return sampler.strip() in spec.schedulers or means_default(sampler) or bool(_sampler_named(sampler.strip())[0])


def means_default(sampler: str) -> bool:
    """Whether a name leaves the sampler to the model."""
    return sampler.strip().lower() in _DEFAULT_SAMPLER


def samplers_of(models: Mapping[str, ModelSpec]) -> list[str]:
    """Return the samplers that have an exact counterpart in a model."""
    here = {scheduler for spec in models.values() for scheduler in spec.schedulers}
    exact = {name: schedulers[: 1 + (name in ("Euler", "Heun"))] for name, schedulers in SAMPLERS.items()}
    return [name for name in SAMPLERS if here & set(exact[name])]


def default_options(name: str) -> dict[str, object]:
    """Return the options of a sampler, as AUTOMATIC1111 lists them: its schedule where it is left to the sampler."""
    return {"scheduler": _AUTOMATIC[name]} if name in _AUTOMATIC else {}


def schedules_of(models: Mapping[str, ModelSpec]) -> list[str]:
    """Return the schedules that a scheduler of a model takes."""
    here = {one for spec in models.values() for scheduler in spec.schedulers for one in SCHEDULERS[scheduler].schedules}
    return [name for name in SCHEDULES if name in here]
