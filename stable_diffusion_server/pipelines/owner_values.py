"""Applies what an owner's spec says (`NAME.toml`) to the spec of his model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stable_diffusion_server.pipelines.library import Kind, LibraryModel
from stable_diffusion_server.pipelines.library.file_headers import read_json_object
from stable_diffusion_server.pipelines.library.identity import UnreadableModel
from stable_diffusion_server.pipelines.model_spec import ModelSpec

# Lin et al. 2023 (arXiv 2305.08891) recommend it for zero terminal SNR.
_RESCALE = 0.7
# Spacing of the steps → options of diffusers' schedulers.
_SCHEDULES: Mapping[str, Mapping[str, object]] = {
    "automatic": {},
    "normal": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
}
# A1111's and Civitai's "clip skip 2" is the last layer but one, which SDXL always takes, and 1 the last one.
# diffusers' scheduler class of a folder → ours of the same arithmetic; another class is drawn as `own`.
_SAME_SCHEDULERS = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
}
# Keys that other parts of the server read, or that inform the reader only.
_ELSEWHERE = frozenset("title aliases variant licence source revision sha256".split())
_FOR_ALL = frozenset(
    "steps guidance scheduler native_size dtype quantization placement loras controlnets preload pin".split()
)  # fmt: skip
_FOR_FILES = frozenset({"vae", "text_encoders"})


class Unusable(Exception):
    """Why a model cannot be used, as a sentence."""


@dataclass(frozen=True, slots=True)
class OwnerValues:
    """The spec of a model after its owner's, and a remark on keys that have no effect; empty if all have."""

    spec: ModelSpec
    remark: str = ""


def with_owner_values(spec: ModelSpec, model: LibraryModel, find: Callable[[str, Kind], str]) -> OwnerValues:
    """Apply the values of `model.spec` that models of this row have a use for, and the scheduler of its folder.

    `find` returns the path of a file of a name and kind, or raises `Unusable`. Raises `Unusable` for a scheduler or
    schedule that there is not.
    """
    usable = _ELSEWHERE | _FOR_ALL | {*spec.owner_keys}
    usable |= frozenset() if model.identity.kind is Kind.PIPELINE else _FOR_FILES
    usable -= frozenset() if spec.takes_guidance else {"guidance"}
    usable -= {"loras", "controlnets"} if spec.any_extra else frozenset()
    usable -= {"placement"} if spec.offload else frozenset()
    values = {key: value for key, value in model.spec.values.items() if key in usable}
    if model.identity.kind is Kind.PIPELINE:
        spec = _with_folders_scheduler(spec, model)
    changes: dict[str, Any] = {}
    if "steps" in values:
        changes["default_steps"] = values["steps"]
    if "guidance" in values:
        changes["default_guidance"] = values["guidance"]
    if "native_size" in values:
        width, height = values["native_size"]
        changes |= {
            "native_pixels": width * height,
            "min_side": min(spec.min_side, width // 64 * 64, height // 64 * 64),
        }
    if (scheduler := values.get("scheduler")) is not None:
        if scheduler not in spec.schedulers:
            names = ", ".join(spec.schedulers)
            raise Unusable(f"The spec of {model.name} names the scheduler {scheduler!r}; there are {names}.")
        changes["default_scheduler"] = scheduler
    if "dtype" in values:
        changes |= {"dtype": values["dtype"], "cpu_dtype": values["dtype"], "measured_dtype": False}
    changes |= {"quantize": values.get("quantization", ""), "offload": values.get("placement", spec.offload)}
    changes |= {"preload": values.get("preload", False), "pinned": values.get("pin", False), "file_bytes": model.size}
    changes["builtin_loras"] = tuple((find(name, Kind.LORA), weight) for name, weight in values.get("loras", ()))
    if controls := values.get("controlnets"):
        changes |= {"control_folder": find(controls[0], Kind.CONTROLNET), "control_repo": None}
    spec = _with_values_of_some(replace(spec, **changes), values)
    return OwnerValues(_with_revision(spec, values), _remark(model, {*model.spec.values} - usable))


def _with_values_of_some(spec: ModelSpec, values: Mapping[str, Any]) -> ModelSpec:
    """Values that not all rows have a use for (`ModelSpec.owner_keys`)."""
    zero_snr = spec.checkpoint.zero_snr if spec.checkpoint else bool(values.get("zero_snr"))
    schedule = values.get("schedule", "automatic")
    if schedule not in _SCHEDULES:
        raise Unusable(f"The schedule {schedule!r} is not there; there are {', '.join(_SCHEDULES)}.")
    options = dict(_SCHEDULES[schedule])
    if spec.checkpoint is None:
        options |= {"prediction_type": values["prediction_type"]} if "prediction_type" in values else {}
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    if "rescale_betas_zero_snr" in options and spec.default_scheduler == "own" and spec.usual_clip_skip == 1:
        # PNDM, which SD 1.5's folders have, knows no zero terminal SNR.
        others = tuple(name for name in spec.schedulers if name != "own")
        spec = replace(spec, default_scheduler=others[0], schedulers=others)
    return replace(
        spec,
        guidance_rescale=values.get("guidance_rescale", _RESCALE if zero_snr else 0.0),
        default_negative_prompt=values.get("negative_prompt", ""),
        clip_skip=max(values.get("clip_skip", 0) - spec.usual_clip_skip, 0),
        scheduler_options=tuple(sorted(options.items())),
    )


def _with_folders_scheduler(spec: ModelSpec, model: LibraryModel) -> ModelSpec:
    """The scheduler that the folder's author chose is the default."""
    try:
        name = str(read_json_object(model.path / "scheduler" / "scheduler_config.json").get("_class_name"))
    except UnreadableModel:  # reported when it is loaded
        return spec
    if spec.any_extra:
        return spec
    same = _SAME_SCHEDULERS.get(name)
    if same in spec.schedulers:
        return replace(spec, default_scheduler=same)
    if "flow_euler" in spec.schedulers:
        raise Unusable(f"{model.name} has the scheduler {name[:60]}, and a FlowMatchEulerDiscreteScheduler is drawn.")
    # EDM counts noise in other numbers: with a scheduler of ours it would be noise.
    others = () if name.startswith("EDM") else tuple(other for other in spec.schedulers if other != "own")
    return replace(spec, default_scheduler="own", schedulers=("own", *others))


def _with_revision(spec: ModelSpec, values: Mapping[str, Any]) -> ModelSpec:
    """Everything beside the files that decides the pixels is part of the revision."""
    files = spec.checkpoint
    suffixes = {
        "": files.prediction if files else "",
        "zsnr": bool(files and files.zero_snr),
        f"rescale{spec.guidance_rescale:g}": spec.guidance_rescale,
        f"skip{spec.clip_skip}": spec.clip_skip,
        str(values.get("dtype")): "dtype" in values,
        **{f"{name}-{value}": True for name, value in spec.scheduler_options},
        **{f"lora{weight:g}": True for _, weight in spec.builtin_loras},
    }
    parts = [suffixes.pop(""), *(part for part, counts in suffixes.items() if counts)]
    return replace(spec, revision="+".join(str(part) for part in (spec.revision, *parts) if part))


def _remark(model: LibraryModel, useless: Collection[str]) -> str:
    if not useless:
        return ""
    place = Path(model.file_name).name
    return f"The spec of {place} has keys without an effect on this model: {', '.join(sorted(useless))}."
