"""What a UNet is given at a step, and what its prediction becomes: conditioning, scales, guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from stable_diffusion_server.pipelines.base import PipelineState, classifier_free
from stable_diffusion_server.pipelines.conditioning.prompt_reader import StepPrompts


@dataclass(frozen=True, slots=True)
class UnetConditioning:
    """The UNet's conditioning: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` is rows × tokens × channels; `added` are further inputs by name, each with the rows first (SDXL's pooled
    prompt and sizes). `masked` is for a UNet made for inpainting: 1 × 5 × h × w, the mask and the latents of the image
    without its masked part. `part` is the component that denoises. `later` are those that follow, each with the
    step from which it counts, if the prompt changes with the step. `warnings` are sentences on what was not read.
    """

    embeds: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    masked: torch.Tensor | None = None
    part: str = "unet"
    later: tuple[tuple[int, UnetConditioning], ...] = ()
    warnings: tuple[str, ...] = ()

    def at(self, step: int) -> UnetConditioning:
        """What counts at a step, from 0, of `embeds` and `added`."""
        return next((later for start, later in reversed(self.later) if start <= step), self)

    @property
    def guided(self) -> bool:
        """Whether there is a negative row."""
        return len(self.embeds) == 2


def vae_statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and deviation of the VAE's latents by channel, if it has them (Playground v2.5): 1 × channels × 1 × 1."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or deviation is None:
        return None
    mean, deviation = (torch.tensor(numbers).view(1, -1, 1, 1).to(like) for numbers in (mean, deviation))
    return mean, deviation


def scaled_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """A VAE's latents in the scale of the UNet."""
    if (statistics := vae_statistics(vae, latents)) is None:
        scaled: torch.Tensor = vae.config.scaling_factor * latents
        return scaled
    mean, deviation = statistics
    return (latents - mean) * vae.config.scaling_factor / deviation


def model_sample(state: PipelineState[UnetConditioning]) -> torch.Tensor:
    """The UNet's input: the latents, and for an inpainting UNet the mask and the masked image."""
    masked = state.conditioning.masked
    return state.model_input if masked is None else torch.cat([state.model_input, masked], dim=1)


def guided_prediction(prediction: torch.Tensor, state: PipelineState[UnetConditioning], rescale: float) -> torch.Tensor:
    """The prediction with classifier-free guidance.

    `rescale` (0..1) brings the spread towards that of the positive row (Lin et al. 2023, arXiv 2305.08891, section
    3.4).
    """
    guided = classifier_free(prediction, state.request.guidance_scale)
    if not rescale or not state.conditioning.guided:
        return guided
    return rescale_noise_cfg(guided, prediction[1:], guidance_rescale=rescale)


def by_step(prompts: Sequence[StepPrompts], conditioned: Callable[[StepPrompts], UnetConditioning]) -> UnetConditioning:
    """The conditioning of prompts, the first with those that follow it."""
    first, *later = (conditioned(prompt) for prompt in prompts)
    starts = [prompt.start for prompt in prompts[1:]]
    return replace(first, later=tuple(zip(starts, later, strict=True)), warnings=prompts[0].warnings)
