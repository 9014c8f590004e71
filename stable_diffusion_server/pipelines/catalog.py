"""The catalogue: one row per model and per scheduler, with sizes, defaults and bounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from stable_diffusion_server.errors import InvalidInput, ModelLoadError, number_text
from stable_diffusion_server.pipelines.model_spec import ModelSpec, SchedulerSpec, known_names
from stable_diffusion_server.pipelines.scheduler_rows import FOR_FLOWS, FOR_NOISE, SCHEDULERS
from stable_diffusion_server.types import PromptSyntax

# Strength of the refining second pass: the original's base model handed over at 0.7 of the steps.
REFINE_STRENGTH = 0.3

Source = Literal["embedded", "local", "hub", "auto"]


_SDXL = "stable_diffusion_server.pipelines.families.sdxl:Sdxl"
_FLUX = "stable_diffusion_server.pipelines.families.flux:Flux"

_EMBEDDED_SDXL = ModelSpec(
    name="sdxl",
    family=_SDXL,
    folder="embedded-sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    revision="embedded-bcc6e75a55",
    weights="ce32af6bf49128f14e39b8a4a0e21e4cca85f1d0d0d013bc3b78245bf70c75f5",
    control_weights="b4c1683dfed2be1ffcea9500d626ea5d48ed081cd46dc63bbf13a92951da6c25",
    native_pixels=384 * 256,
    min_side=128,
    text_tokens=77,
    default_steps=4,
    default_guidance=2.0,
    default_scheduler="euler",
    schedulers=FOR_NOISE,
    takes_negative_prompt=True,
    control_folder="embedded-controlnet-canny-sdxl",
    control_scale=1.0,
    prompt_syntax=PromptSyntax.A1111,
    takes_prompt_2=True,
    weighs_prompts=True,
    reads_empty_negative=True,
    usual_clip_skip=2,
)
_EMBEDDED_FLUX = ModelSpec(
    name="flux",
    family=_FLUX,
    folder="embedded-flux",
    pipeline_class="FluxPipeline",
    revision="embedded-e9b0776348",
    weights="6ecec1f634fd04b9a46c542747964b8685cfe7f384eefc14166f8d0fdf38b02d",
    control_weights="e5b9688df139a7db3252e2f16ea76c914261defe3d9f9d17dbf7e1f3e100dbe3",
    native_pixels=384 * 256,
    min_side=128,
    text_tokens=32,
    default_steps=4,
    default_guidance=0.0,
    default_scheduler="flow_euler",
    schedulers=FOR_FLOWS,
    takes_negative_prompt=False,
    takes_guidance=False,
    takes_controlnet_lora=True,
    takes_dfloat11=True,
    lowercase_prompts=True,
    rounds_steps_up=True,
    control_folder="embedded-controlnet-canny-flux",
    control_class="FluxControlNetModel",
    control_scale=1.0,
    denoiser_part="transformer",
    quantizable_parts=("transformer", "text_encoder_2", "control"),
    prompt_syntax=PromptSyntax.A1111,
    takes_prompt_2=True,
)
_SDXL_BASE = ModelSpec(
    name="sdxl",
    family=_SDXL,
    folder="stable-diffusion-xl-base-1.0",
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline_class="StableDiffusionXLPipeline",
    revision="sdxl-base-1.0",
    native_pixels=1024 * 1024,
    min_side=512,
    text_tokens=77,
    default_steps=25,
    default_guidance=7.0,
    default_scheduler="euler",
    schedulers=FOR_NOISE,
    takes_negative_prompt=True,
    control_folder="diffusers/controlnet-canny-sdxl-1.0",
    control_repo="diffusers/controlnet-canny-sdxl-1.0",
    lcm_folder="lcm-lora-sdxl",
    lcm_repo="latent-consistency/lcm-lora-sdxl",
    dtype="float16",
    measured_dtype=True,
    variant="fp16",
    prompt_syntax=PromptSyntax.A1111,
    takes_prompt_2=True,
    weighs_prompts=True,
    reads_empty_negative=True,
    usual_clip_skip=2,
)
_PROTEUS = replace(_SDXL_BASE, folder="ProteusV0.2", repo="dataautogpt3/ProteusV0.2", revision="proteus-0.2")
_FLUX_SCHNELL = ModelSpec(
    name="flux",
    family=_FLUX,
    folder="FLUX.1-schnell",
    repo="black-forest-labs/FLUX.1-schnell",
    pipeline_class="FluxPipeline",
    revision="flux.1-schnell",
    native_pixels=1024 * 1024,
    min_side=256,
    text_tokens=256,
    default_steps=4,
    default_guidance=0.0,
    default_scheduler="flow_euler",
    schedulers=FOR_FLOWS,
    takes_negative_prompt=False,
    takes_guidance=False,
    takes_controlnet_lora=True,
    takes_dfloat11=True,
    rounds_steps_up=True,
    control_folder="flux-controlnet-canny",
    control_repo="XLabs-AI/flux-controlnet-canny-diffusers",
    control_class="FluxControlNetModel",
    control_scale=0.7,
    denoiser_part="transformer",
    quantizable_parts=("transformer", "text_encoder_2", "control"),
    prompt_syntax=PromptSyntax.A1111,
    takes_prompt_2=True,
    dtype="bfloat16",
    cpu_dtype="bfloat16",  # 24 GB; fp32 would be 48
    measured_dtype=True,
)

_EMBEDDED: dict[str, ModelSpec] = {spec.name: spec for spec in (_EMBEDDED_SDXL, _EMBEDDED_FLUX)}
_REAL: dict[str, tuple[ModelSpec, ...]] = {"sdxl": (_PROTEUS, _SDXL_BASE), "flux": (_FLUX_SCHNELL,)}

# The embedded models by name; `choose_models` may replace them by real weights.
MODELS: Mapping[str, ModelSpec] = MappingProxyType(_EMBEDDED)
# The weights the original server used, by name, the preferred ones first.
REAL_MODELS: Mapping[str, tuple[ModelSpec, ...]] = MappingProxyType(_REAL)


def choose_models(
    source: Source, present: Collection[str], wanted: Sequence[str] = ("sdxl",)
) -> Mapping[str, ModelSpec]:
    """The models to load, by name.

    `embedded` chooses those that come with the server, `local` the real ones whose folders are among `present`, `hub`
    the same and those that `wanted` names by model name, folder or repository, and `auto` the real ones that are
    present, with the embedded ones for the rest. Raises `ModelLoadError` when `local` finds none, or `wanted` holds an
    unknown name.
    """
    if source == "embedded":
        return MODELS
    candidates = {name: next((spec for spec in specs if spec.folder in present), None) for name, specs in _REAL.items()}
    found = {name: spec for name, spec in candidates.items() if spec is not None}
    if source == "auto":
        return {**MODELS, **found}
    if source == "hub":
        found |= {spec.name: spec for spec in (_spec_by_any_name(name, found) for name in wanted)}
        return {name: found[name] for name in REAL_MODELS if name in found}
    if not found:
        folders = ", ".join(spec.folder for specs in REAL_MODELS.values() for spec in specs)
        raise ModelLoadError(f"MODELS=local was asked for, and MODELS_DIR holds none of {folders}.")
    return found


def _spec_by_any_name(name: str, found: Mapping[str, ModelSpec]) -> ModelSpec:
    """The real model of a name, folder or repository; for a name, one that is `found` before the preferred one."""
    if name.lower() in REAL_MODELS:
        return found.get(name.lower()) or REAL_MODELS[name.lower()][0]
    specs = [spec for candidates in REAL_MODELS.values() for spec in candidates]
    for spec in specs:
        if name.lower() in (spec.folder.lower(), (spec.repo or "").lower()):
            return spec
    names = ", ".join([*REAL_MODELS, *(spec.folder for spec in specs)])
    raise ModelLoadError(f"HUB_MODELS names {name[:100]!r}, and there are {names}.")


def with_weights(spec: ModelSpec, weights: str, control: str) -> ModelSpec:
    """The spec with the digests of the loaded files in its revisions; `control` is empty without a ControlNet.

    A revision keeps its name when the digest is the one in the catalogue.
    """
    return replace(
        spec,
        revision=spec.revision if weights == spec.weights else f"{spec.revision}-{weights[:16]}",
        control_revision="" if control in ("", spec.control_weights) else control[:16],
    )


def without_identity(spec: ModelSpec) -> ModelSpec:
    """The spec before its weights were read, with a revision that no stored image has."""
    return spec if spec.weights else replace(spec, revision=f"{spec.revision}-unread")


def with_lcm(spec: ModelSpec) -> ModelSpec:
    """The spec with its latent-consistency LoRA (Luo et al. 2023, arXiv 2311.05556), unchanged if it has none.

    Steps and guidance are those its authors recommend.
    """
    if spec.lcm_folder is None:
        return spec
    return replace(
        spec,
        revision=f"{spec.revision}+lcm",
        default_steps=5,
        default_guidance=1.0,
        default_scheduler="lcm",
        schedulers=("lcm", *(name for name in spec.schedulers if name != "lcm")),
        builtin_loras=((spec.lcm_folder, 1.0),),
    )


def with_quantization(spec: ModelSpec, quantize: str) -> ModelSpec:
    """The spec with the quantization in its revision, since quantized weights generate other images."""
    return spec if quantize in ("auto", "none") else replace(spec, revision=f"{spec.revision}+{quantize}")


def with_cpu_dtype(spec: ModelSpec, dtype: str) -> ModelSpec:
    """The spec with another dtype on the CPU, also in its revision, since it generates other images."""
    if dtype == spec.cpu_dtype:
        return spec
    return replace(spec, cpu_dtype=dtype, measured_dtype=False, revision=f"{spec.revision}+{dtype}")


def spec_of(model: str, models: Mapping[str, ModelSpec] = MODELS) -> ModelSpec:
    """The spec of a model by name. Raises `InvalidInput` for a name that is not among `models`."""
    if model not in models:
        raise InvalidInput(f"{model[:100]!r} is not a model here; {known_names(model, sorted(models))}.", field="model")
    return models[model]


def scheduler_of(model: ModelSpec, scheduler: str, steps: int) -> SchedulerSpec:
    """The spec of a scheduler. Raises `InvalidInput` when the model does not have it, or it does not take `steps`."""
    if scheduler not in model.schedulers:
        names = ", ".join(model.schedulers)
        raise InvalidInput(
            f"{scheduler[:100]!r} is not a scheduler of {model.name}; it has {names}.", field="scheduler"
        )
    spec = SCHEDULERS[scheduler]
    if not spec.min_steps <= steps <= spec.max_steps:
        bounds = f"from {spec.min_steps} to {spec.max_steps}"
        raise InvalidInput(f"The scheduler {scheduler} takes {bounds} steps.", field="num_inference_steps")
    return spec


def steps_skipped(model: ModelSpec, steps: int, strength: float) -> int:
    """How many of `steps` image-to-image with `strength` (0..1) skips, rounded as diffusers does; never all of them."""
    return min(_skipped(model, steps, strength), steps - 1)


def check_strength(model: ModelSpec, steps: int, strength: float) -> None:
    """Raise `InvalidInput` naming both parameters if diffusers would draw no step: an image-to-image without effect."""
    if _skipped(model, steps, strength) >= steps:
        # Rounded up, since a share of a step is none; where steps are rounded up, anything above 0 is one.
        least = "any above 0" if model.rounds_steps_up else f"{math.ceil(10_000 / steps) / 10_000:g} or more"
        sentence = f"strength {number_text(strength)} of {steps} steps leaves none to draw; {least} draws one."
        raise InvalidInput.from_faults([("strength", sentence), ("num_inference_steps", sentence)])


def refine_steps_skipped(model: ModelSpec, steps: int) -> int:
    """How many of `steps` the refining second pass skips; it always takes at least one."""
    return steps_skipped(model, steps, REFINE_STRENGTH)


def _skipped(model: ModelSpec, steps: int, strength: float) -> int:
    """The arithmetic of diffusers' `get_timesteps`, which differs between its pipelines."""
    if model.rounds_steps_up:
        return int(max(steps - min(steps * strength, steps), 0))
    return steps - min(int(steps * strength), steps)
