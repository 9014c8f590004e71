"""The parameters of a request with all defaults, for its first pass, and what its second pass does otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from stable_diffusion_server.generation.control_units import ResolvedControl
from stable_diffusion_server.generation.image_prompts import ResolvedImagePrompt
from stable_diffusion_server.generation.interfaces import ChosenUpscaler
from stable_diffusion_server.pipelines import ModelSpec
from stable_diffusion_server.types import ExtraValue, GenerationRequest, LatentResize, PromptSyntax, RequestWarning


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """The parameters of a request with all defaults, without its input images.

    `prompt_syntax` and `is_marked` are those of `ReadPrompts`. `clip_skip` is `None` if it is the model's own.
    `embeddings` are name and digest of those that the prompts name.
    """

    spec: ModelSpec
    prompt: str
    negative_prompt: str | None
    prompt_2: str | None
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    strength: float
    canny: bool
    control_scale: float
    prompt_syntax: PromptSyntax
    is_marked: bool
    clip_skip: int | None
    warnings: tuple[RequestWarning, ...]
    sampling: tuple[tuple[str, ExtraValue], ...] = ()
    embeddings: tuple[tuple[str, str], ...] = ()
    controls: tuple[ResolvedControl, ...] = ()
    image_prompts: tuple[ResolvedImagePrompt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPassPlan:
    """What the second pass of a request does otherwise than the first.

    `own` are a request and its parameters with the words, LoRAs and sampler of the second pass, `None` for those of the
    first. `lora_digests` are the SHA-256 of its LoRA files. `upscaler` is `None` for the usual Lanczos; `latents` says
    how it enlarges latents, `None` if it enlarges images. `warnings` are those of both passes.
    """

    warnings: tuple[RequestWarning, ...]
    own: tuple[GenerationRequest, ResolvedParameters] | None = None
    lora_digests: tuple[str, ...] = ()
    upscaler: ChosenUpscaler | None = None
    latents: LatentResize | None = None
