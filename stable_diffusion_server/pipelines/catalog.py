"""Facts per model: sizes, text length, defaults, schedulers and their bounds. A table; knows no torch and no files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from stable_diffusion_server.errors import InvalidInput, ModelLoadError

# How much a refining second pass draws anew: the original handed over at 0.7 of the way.
REFINE_STRENGTH = 0.3

Source = Literal["embedded", "local", "hub", "auto"]


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """A scheduler by its diffusers class, with the configuration that makes it this one, and its step bounds."""

    class_name: str
    min_steps: int = 1
    max_steps: int = 1000
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What has to be known of a model before it is loaded.

    `native_pixels` is the largest area it draws well, in pixels; `floor` its smallest side. `text_tokens` is the
    length its prompt is read to, special tokens included. `revision` names these very weights: pictures of another
    revision are other pictures. `weights` and `control_weights` are the digests of the files that it stands for;
    without them the loader adds what it finds (`with_weights`). Folders are beside one another in the models'
    folder, and `repo` and `control_repo` say where on the Hugging Face hub they come from. `bumpy_redraws` is how
    often a picture that is too bumpy is drawn again. `rounds_steps_up` tells how a strength becomes steps. `always`
    are adapters that belong to the model, by folder and weight. `dtype` and `cpu_dtype` name the torch type of its
    weights on an accelerator and on the CPU, `variant` the files preferred, `denoiser` the part that takes the
    steps, `quantized` the parts that are worth finer weights.
    """

    name: str
    folder: str
    pipeline_class: str
    revision: str
    native_pixels: int
    floor: int
    text_tokens: int
    default_steps: int
    default_guidance: float
    default_scheduler: str
    schedulers: tuple[str, ...]
    takes_negative_prompt: bool
    takes_guidance: bool = True
    bumpy_redraws: int = 0
    lowercase_prompts: bool = False
    weights: str = ""
    control_weights: str = ""
    control_revision: str = ""
    rounds_steps_up: bool = False
    control_folder: str | None = None
    control_class: str = "ControlNetModel"
    control_scale: float = 0.5
    repo: str | None = None
    control_repo: str | None = None
    lcm_folder: str | None = None
    lcm_repo: str | None = None
    always: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    cpu_dtype: str = "float32"
    variant: str | None = None
    denoiser: str = "unet"
    quantized: tuple[str, ...] = ("unet", "control")

    def revision_drawing(self, *, edges: bool) -> str:
        """The revision of a picture: that of the weights, and of the ControlNet where it follows edges."""
        return f"{self.revision}+edges-{self.control_revision}" if edges and self.control_revision else self.revision


SCHEDULERS: Mapping[str, SchedulerSpec] = MappingProxyType(
    {
        "euler": SchedulerSpec("EulerDiscreteScheduler"),
        "euler_a": SchedulerSpec("EulerAncestralDiscreteScheduler"),
        # Clipping is meant for pixels; in latents it greys the picture.
        "ddim": SchedulerSpec("DDIMScheduler", options=MappingProxyType({"clip_sample": False})),
        # It skips through the 50 steps it was distilled on, so it has no more.
        "lcm": SchedulerSpec("LCMScheduler", max_steps=50, options=MappingProxyType({"clip_sample": False})),
        "dpm": SchedulerSpec(
            "DPMSolverMultistepScheduler",
            options=MappingProxyType({"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}),
        ),
        "flow_euler": SchedulerSpec("FlowMatchEulerDiscreteScheduler"),
    }
)

_EMBEDDED_SDXL = ModelSpec(
    name="sdxl",
    folder="embedded-sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    revision="embedded-bcc6e75a55",
    weights="ce32af6bf49128f14e39b8a4a0e21e4cca85f1d0d0d013bc3b78245bf70c75f5",
    control_weights="b4c1683dfed2be1ffcea9500d626ea5d48ed081cd46dc63bbf13a92951da6c25",
    native_pixels=384 * 256,
    floor=128,
    text_tokens=77,
    default_steps=4,
    default_guidance=2.0,
    default_scheduler="euler",
    schedulers=("euler", "euler_a", "ddim"),
    takes_negative_prompt=True,
    control_folder="embedded-controlnet-canny-sdxl",
    control_scale=1.0,
)
_EMBEDDED_FLUX = ModelSpec(
    name="flux",
    folder="embedded-flux",
    pipeline_class="FluxPipeline",
    revision="embedded-e9b0776348",
    weights="6ecec1f634fd04b9a46c542747964b8685cfe7f384eefc14166f8d0fdf38b02d",
    control_weights="e5b9688df139a7db3252e2f16ea76c914261defe3d9f9d17dbf7e1f3e100dbe3",
    native_pixels=384 * 256,
    floor=128,
    text_tokens=32,
    default_steps=4,
    default_guidance=0.0,
    default_scheduler="flow_euler",
    schedulers=("flow_euler",),
    takes_negative_prompt=False,
    takes_guidance=False,
    lowercase_prompts=True,
    rounds_steps_up=True,
    control_folder="embedded-controlnet-canny-flux",
    control_class="FluxControlNetModel",
    control_scale=1.0,
    denoiser="transformer",
    quantized=("transformer", "text_encoder_2", "control"),
)
_SDXL_BASE = ModelSpec(
    name="sdxl",
    folder="stable-diffusion-xl-base-1.0",
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline_class="StableDiffusionXLPipeline",
    revision="sdxl-base-1.0",
    native_pixels=1024 * 1024,
    floor=512,
    text_tokens=77,
    default_steps=25,
    default_guidance=7.0,
    default_scheduler="euler",
    schedulers=("euler", "euler_a", "ddim", "dpm", "lcm"),
    takes_negative_prompt=True,
    control_folder="diffusers/controlnet-canny-sdxl-1.0",
    control_repo="diffusers/controlnet-canny-sdxl-1.0",
    lcm_folder="lcm-lora-sdxl",
    lcm_repo="latent-consistency/lcm-lora-sdxl",
    dtype="float16",
    variant="fp16",
)
_PROTEUS = replace(_SDXL_BASE, folder="ProteusV0.2", repo="dataautogpt3/ProteusV0.2", revision="proteus-0.2")
_FLUX_SCHNELL = ModelSpec(
    name="flux",
    folder="FLUX.1-schnell",
    repo="black-forest-labs/FLUX.1-schnell",
    pipeline_class="FluxPipeline",
    revision="flux.1-schnell",
    native_pixels=1024 * 1024,
    floor=256,
    text_tokens=256,
    default_steps=4,
    default_guidance=0.0,
    default_scheduler="flow_euler",
    schedulers=("flow_euler",),
    takes_negative_prompt=False,
    takes_guidance=False,
    rounds_steps_up=True,
    control_folder="flux-controlnet-canny",
    control_repo="XLabs-AI/flux-controlnet-canny-diffusers",
    control_class="FluxControlNetModel",
    control_scale=0.7,
    denoiser="transformer",
    quantized=("transformer", "text_encoder_2", "control"),
    dtype="bfloat16",
    cpu_dtype="bfloat16",  # 24 GB; fp32 would be 48
)

# What comes with the server; `choose_models` may put real weights in their places.
MODELS: Mapping[str, ModelSpec] = MappingProxyType({"sdxl": _EMBEDDED_SDXL, "flux": _EMBEDDED_FLUX})
# The weights the original used, by family, the preferred one first.
REAL_MODELS: Mapping[str, tuple[ModelSpec, ...]] = MappingProxyType(
    {"sdxl": (_PROTEUS, _SDXL_BASE), "flux": (_FLUX_SCHNELL,)}
)


def choose_models(
    source: Source, present: Collection[str], wanted: Sequence[str] = ("sdxl",)
) -> Mapping[str, ModelSpec]:
    """The model of each family, by name.

    `embedded` are those that come with the server; `local` the real ones whose folders are among `present`; `hub`
    these, and of the hub those that are `wanted` by family, folder or repository; `auto` the real ones that are
    present, else the embedded. Raises `ModelLoadError` when `local` finds none, or `hub` knows none of a wanted name.
    """
    if source == "embedded":
        return MODELS
    found = {
        name: next((facts for facts in candidates if facts.folder in present), None)
        for name, candidates in REAL_MODELS.items()
    }
    here = {name: facts for name, facts in found.items() if facts is not None}
    if source == "hub":
        here |= {facts.name: facts for facts in (_wanted(name, here) for name in wanted)}
        return {name: here[name] for name in REAL_MODELS if name in here}
    if source == "auto":
        return {name: facts or MODELS[name] for name, facts in found.items()}
    if not here:
        folders = ", ".join(facts.folder for candidates in REAL_MODELS.values() for facts in candidates)
        raise ModelLoadError(f"MODELS=local was asked for, and MODELS_DIR holds none of {folders}.")
    return here


def _wanted(name: str, here: Mapping[str, ModelSpec]) -> ModelSpec:
    """The real model of a name: that of a family that is here, else its first one; or one by folder or repository."""
    if name.lower() in REAL_MODELS:
        return here.get(name.lower()) or REAL_MODELS[name.lower()][0]
    known = [facts for candidates in REAL_MODELS.values() for facts in candidates]
    for facts in known:
        if name.lower() in (facts.folder.lower(), (facts.repo or "").lower()):
            return facts
    names = ", ".join([*REAL_MODELS, *(facts.folder for facts in known)])
    raise ModelLoadError(f"HUB_MODELS names {name[:100]!r}, and there are {names}.")


def with_weights(facts: ModelSpec, weights: str, control: str) -> ModelSpec:
    """The model as the files say that were loaded, by their digests; `control` is empty without a ControlNet.

    A revision of the catalogue that stands for these very weights stays as it is.
    """
    return replace(
        facts,
        revision=facts.revision if weights == facts.weights else f"{facts.revision}-{weights[:16]}",
        control_revision="" if control in ("", facts.control_weights) else control[:16],
    )


def without_identity(facts: ModelSpec) -> ModelSpec:
    """The model before its weights were read: nothing that is stored was drawn by one of this revision."""
    return facts if facts.weights else replace(facts, revision=f"{facts.revision}-unread")


def with_lcm(facts: ModelSpec) -> ModelSpec:
    """The model drawn by its latent-consistency LoRA (Luo et al. 2023, arXiv 2311.05556); itself where there is none.

    Few steps and hardly any guidance, as its authors have it.
    """
    if facts.lcm_folder is None:
        return facts
    return replace(
        facts,
        revision=f"{facts.revision}+lcm",
        default_steps=5,
        default_guidance=1.0,
        default_scheduler="lcm",
        schedulers=("lcm", *(name for name in facts.schedulers if name != "lcm")),
        always=((facts.lcm_folder, 1.0),),
    )


def with_quantization(facts: ModelSpec, quantize: str) -> ModelSpec:
    """The model with weights in one byte each: other weights, and so other pictures."""
    return facts if quantize in ("auto", "none") else replace(facts, revision=f"{facts.revision}+{quantize}")


def spec_of(model: str, models: Mapping[str, ModelSpec] = MODELS) -> ModelSpec:
    """The facts of a model by name. Raises `InvalidInput` for a name that is not among `models`."""
    if model not in models:
        raise InvalidInput(
            f"{model[:100]!r} is not a model here; there are {', '.join(sorted(models))}.", field="model"
        )
    return models[model]


def scheduler_of(model: ModelSpec, scheduler: str, steps: int) -> SchedulerSpec:
    """The facts of a scheduler. Raises `InvalidInput` when the model has none of that name or not for `steps`."""
    if scheduler not in model.schedulers:
        names = ", ".join(model.schedulers)
        raise InvalidInput(
            f"{scheduler[:100]!r} is not a scheduler of {model.name}; it has {names}.", field="scheduler"
        )
    facts = SCHEDULERS[scheduler]
    if not facts.min_steps <= steps <= facts.max_steps:
        bounds = f"from {facts.min_steps} to {facts.max_steps}"
        raise InvalidInput(f"The scheduler {scheduler} takes {bounds} steps.", field="num_inference_steps")
    return facts


def steps_skipped(model: ModelSpec, steps: int, strength: float) -> int:
    """How many of `steps` a picture drawn anew by `strength` (0..1) leaves out, rounded as diffusers does.

    Raises `InvalidInput` naming both parameters when no step would be left.
    """
    skipped = _skipped(model, steps, strength)
    if skipped >= steps:
        sentence = f"strength {strength:g} of {steps} steps leaves none to draw; raise one of the two."
        raise InvalidInput.from_faults([("strength", sentence), ("num_inference_steps", sentence)])
    return skipped


def refine_steps_skipped(model: ModelSpec, steps: int) -> int:
    """How many of `steps` a refining second pass leaves out; it takes at least one."""
    return min(_skipped(model, steps, REFINE_STRENGTH), steps - 1)


def _skipped(model: ModelSpec, steps: int, strength: float) -> int:
    """The arithmetic of diffusers' `get_timesteps`, which differs between the families."""
    if model.rounds_steps_up:
        return int(max(steps - min(steps * strength, steps), 0))
    return steps - min(int(steps * strength), steps)
