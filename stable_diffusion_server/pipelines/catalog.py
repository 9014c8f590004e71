"""Facts per model: sizes, text length, defaults, schedulers and their bounds. A table; knows no torch and no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from stable_diffusion_server.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class SchedulerFacts:
    """A scheduler by its diffusers class, with the configuration that makes it this one, and its step bounds."""

    class_name: str
    min_steps: int = 1
    max_steps: int = 1000
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What has to be known of a model before it is loaded.

    `native_pixels` is the largest area it draws well, in pixels; `floor` its smallest side. `text_tokens` is the
    length its prompt is read to, special tokens included. `revision` names these very weights: pictures of another
    revision are other pictures.
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
    lowercase_prompts: bool = False


SCHEDULERS: Mapping[str, SchedulerFacts] = MappingProxyType(
    {
        "euler": SchedulerFacts("EulerDiscreteScheduler"),
        "euler_a": SchedulerFacts("EulerAncestralDiscreteScheduler"),
        # Clipping is meant for pixels; in latents it greys the picture.
        "ddim": SchedulerFacts("DDIMScheduler", options=MappingProxyType({"clip_sample": False})),
        "flow_euler": SchedulerFacts("FlowMatchEulerDiscreteScheduler"),
    }
)

MODELS: Mapping[str, ModelFacts] = MappingProxyType(
    {
        "sdxl": ModelFacts(
            name="sdxl",
            folder="embedded-sdxl",
            pipeline_class="StableDiffusionXLPipeline",
            revision="embedded-64502f6be2",
            native_pixels=128 * 128,
            floor=128,
            text_tokens=77,
            default_steps=4,
            default_guidance=2.0,
            default_scheduler="euler",
            schedulers=("euler", "euler_a", "ddim"),
            takes_negative_prompt=True,
        ),
        "flux": ModelFacts(
            name="flux",
            folder="embedded-flux",
            pipeline_class="FluxPipeline",
            revision="embedded-2e66fba553",
            native_pixels=128 * 128,
            floor=128,
            text_tokens=32,
            default_steps=4,
            default_guidance=0.0,
            default_scheduler="flow_euler",
            schedulers=("flow_euler",),
            takes_negative_prompt=False,
            lowercase_prompts=True,
        ),
    }
)


def facts_of(model: str) -> ModelFacts:
    """The facts of a model by name. Raises `InvalidInput` for a name that is not in the catalogue."""
    if model not in MODELS:
        raise InvalidInput(f"{model!r} is not a model here; there are {', '.join(sorted(MODELS))}.", field="model")
    return MODELS[model]


def scheduler_of(model: ModelFacts, scheduler: str, steps: int) -> SchedulerFacts:
    """The facts of a scheduler. Raises `InvalidInput` when the model has none of that name or not for `steps`."""
    if scheduler not in model.schedulers:
        names = ", ".join(model.schedulers)
        raise InvalidInput(f"{scheduler!r} is not a scheduler of {model.name}; it has {names}.", field="scheduler")
    facts = SCHEDULERS[scheduler]
    if not facts.min_steps <= steps <= facts.max_steps:
        bounds = f"from {facts.min_steps} to {facts.max_steps}"
        raise InvalidInput(f"The scheduler {scheduler} takes {bounds} steps.", field="num_inference_steps")
    return facts
