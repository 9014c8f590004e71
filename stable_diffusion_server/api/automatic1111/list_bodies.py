"""Responses of AUTOMATIC1111's lists of what is installed, and the lists themselves.

A list of what this server does not have is empty, so that a client's menu is empty and the client starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil
from typing_extensions import TypedDict  # pydantic rejects typing.TypedDict before Python 3.12

from stable_diffusion_server.api.automatic1111.adetailer import ADETAILER
from stable_diffusion_server.api.automatic1111.sampler_names import schedules_of
from stable_diffusion_server.api.dependencies import DialectContext
from stable_diffusion_server.imaging import LATENT_UPSCALERS, SCHEDULE_NAMES, Resampling
from stable_diffusion_server.pipelines import Embedding

_FILTERS = ("None", *Resampling)
CONTROLNET_SCRIPT = "controlnet"
_SCHEDULE_ALIASES = {"normal": ("uniform",), "trailing": ("sgm_uniform", "simple"), "ays": ("align_your_steps",)}


class Automatic1111UpscalerBody(TypedDict):
    """An upscaler and its usual factor. `model_name` is null for a filter; places of files are private, and null."""

    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: float


class Automatic1111SchedulerBody(TypedDict):
    """A spacing of the denoising steps."""

    name: str
    label: str
    aliases: list[str] | None
    default_rho: float
    need_inner_model: bool


class Automatic1111StyleBody(TypedDict):
    """A style: the texts that prompts are put in."""

    name: str
    prompt: str
    negative_prompt: str


class Automatic1111EmbeddingsBody(TypedDict):
    """Textual inversion embeddings by name: those that your model reads, and the others in the folder.

    Each has `vectors` of `shape` numbers, of all text encoders together; 0 if its file cannot be read. `step`,
    `sd_checkpoint` and `sd_checkpoint_name` are null: how it was trained is unknown here.
    """

    loaded: dict[str, dict[str, int | None]]
    skipped: dict[str, dict[str, int | None]]


class Automatic1111ScriptsBody(TypedDict):
    """Names of the scripts, in lower case."""

    txt2img: list[str]
    img2img: list[str]


class Automatic1111ScriptInfoBody(TypedDict):
    """A script."""

    name: str
    is_alwayson: bool
    is_img2img: bool
    args: list[dict[str, object]]


class Automatic1111FlagsBody(TypedDict):
    """Command line flags that describe this server. Paths are null: they are private."""

    api: bool
    nowebui: bool
    api_server_stop: bool
    enable_insecure_extension_access: bool
    lowvram: bool
    medvram: bool
    ckpt_dir: str | None
    vae_dir: str | None
    lora_dir: str | None
    embeddings_dir: str | None
    hypernetwork_dir: str | None


class Automatic1111MemoryBody(TypedDict):
    """Bytes of memory: `free`, `used` and `total` of the process's RAM, and of the accelerator, or an `error`."""

    ram: dict[str, object]
    cuda: dict[str, object]


class Automatic1111LatentModeBody(TypedDict):
    """A way to enlarge latents, for `hr_upscaler`."""

    name: str


def latent_modes_body(context: DialectContext) -> list[Automatic1111LatentModeBody]:
    """List the ways to enlarge latents between the passes of hires fix."""
    return [{"name": name} for name in LATENT_UPSCALERS.values()]


def upscalers_body(context: DialectContext) -> list[Automatic1111UpscalerBody]:
    """List the upscalers of `extra-single-image` and of `hr_upscaler`: filters, and networks by their files."""
    return [
        {
            "name": name,
            "model_name": None if name in _FILTERS else name,
            "model_path": None,
            "model_url": None,
            "scale": factor,
        }
        for name, factor in {"None": 4.0, **context.upscaler.factors()}.items()
    ]


def schedulers_body(context: DialectContext) -> list[Automatic1111SchedulerBody]:
    """List the spacings of the steps. Automatic is the sampler's own, as AUTOMATIC1111 has it."""
    return [
        {
            "name": name,
            "label": SCHEDULE_NAMES.get(name, name.capitalize()),
            "aliases": [*_SCHEDULE_ALIASES[name]] if name in _SCHEDULE_ALIASES else None,
            "default_rho": 7.0 if name == "karras" else -1.0,
            "need_inner_model": False,
        }
        for name in ("automatic", *schedules_of(context.models))
    ]


def styles_body(context: DialectContext) -> list[Automatic1111StyleBody]:
    """List the styles that `styles` names."""
    styles = context.expander.files.styles().values()
    return [{"name": one.name, "prompt": one.prompt, "negative_prompt": one.negative_prompt} for one in styles]


def embeddings_body(context: DialectContext) -> Automatic1111EmbeddingsBody:
    """List the textual inversion embeddings: those that the selected model reads, and the others."""
    spec = context.find_model(None)
    loaded, skipped = context.embeddings(spec.name) if spec is not None else ({}, {})
    return {
        "loaded": {name: _embedding(found) for name, found in loaded.items()},
        "skipped": {name: _embedding(found) for name, found in skipped.items()},
    }


def _embedding(found: Embedding | None) -> dict[str, int | None]:
    return {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": 0 if found is None else sum(found.widths.values()),
        "vectors": 0 if found is None else found.count,
    }


def scripts_body(context: DialectContext) -> Automatic1111ScriptsBody:
    """List the scripts: ControlNet where a model has one, ADetailer where there are detectors."""
    names = [CONTROLNET_SCRIPT] if has_controlnet(context) else []
    names += [ADETAILER] if context.detector.names() else []
    return {"txt2img": names, "img2img": names}


def script_info_body(context: DialectContext) -> list[Automatic1111ScriptInfoBody]:
    """Describe the scripts. The units of ControlNet are objects, so it has no arguments in a fixed order."""
    return [
        {"name": CONTROLNET_SCRIPT, "is_alwayson": True, "is_img2img": is_img2img, "args": []}
        for is_img2img in (False, True)
        if has_controlnet(context)
    ]


def flags_body(context: DialectContext) -> Automatic1111FlagsBody:
    """Return the command line flags that describe this server."""
    return {
        "api": True,
        "nowebui": True,
        "api_server_stop": False,
        "enable_insecure_extension_access": False,
        "lowvram": False,
        "medvram": False,
        "ckpt_dir": None,
        "vae_dir": None,
        "lora_dir": None,
        "embeddings_dir": None,
        "hypernetwork_dir": None,
    }


def memory_body(context: DialectContext, *, anonymous: bool) -> Automatic1111MemoryBody:
    """Return the bytes of RAM, and of the first accelerator. Anonymous callers learn nothing of the machine."""
    unknown: dict[str, object] = {"error": "unavailable"}
    if anonymous:
        return {"ram": unknown, "cuda": unknown}
    whole = psutil.virtual_memory()
    ram: dict[str, object] = {
        "free": whole.available,
        "used": psutil.Process().memory_info().rss,
        "total": whole.total,
    }
    return {"ram": ram, "cuda": _cuda(context.device_memory()) or unknown}


def _cuda(devices: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """Return the memory of the first CUDA device by kind, in AUTOMATIC1111's shape; empty without one."""
    kinds = next((kinds for name, kinds in devices.items() if name.startswith("cuda") and kinds), None)
    if kinds is None:
        return {}
    free, reserved = kinds["free"], kinds["reserved"]
    return {
        "system": {"free": free, "used": reserved, "total": free + reserved},
        "allocated": {"current": kinds["used"]},
        "reserved": {"current": reserved},
    }


def empty_list(context: DialectContext) -> list[Any]:
    """Return an empty list: this server has none of these."""
    return []


def has_controlnet(context: DialectContext) -> bool:
    """Return whether a model has a ControlNet."""
    models = context.models.values()
    return any(spec.control_folder or context.controlnets.usable(spec) for spec in models)
