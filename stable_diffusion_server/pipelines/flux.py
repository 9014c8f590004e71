"""The Flux family: how a job becomes a state and a batch of states takes one step. Knows no other family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from stable_diffusion_server.orders import Job
from stable_diffusion_server.pipelines.catalog import ModelFacts, scheduler_of
from stable_diffusion_server.pipelines.components import make_scheduler, token_counter
from stable_diffusion_server.pipelines.denoising import Drawn, State, decode, torch_errors_told


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the transformer is told of one job.

    `embeds` 1 × tokens × channels (T5), `pooled` 1 × channels (CLIP), `guidance` 1 or `None` where the model was
    distilled without it; `text_ids` tokens × 3 and `image_ids` patches × 3 are positions, equal for a shape.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    guidance: torch.Tensor | None
    text_ids: torch.Tensor
    image_ids: torch.Tensor


class Flux:
    """Draws with a stock `FluxPipeline`'s own parts; equal to its `__call__` (tests/pipelines)."""

    def __init__(self, pipeline: Any, facts: ModelFacts) -> None:
        self.pipeline = pipeline
        self.facts = facts
        self._count = token_counter(pipeline.tokenizer_2)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of T5, which reads the whole prompt; CLIP's pooled reading only sets the mood."""
        return self._count(self._text(prompt))

    def prepare(self, job: Job) -> State[Conditioning]:
        """Encode the prompt, draw the first noise, set the timesteps."""
        with torch_errors_told():
            pipe = self.pipeline
            # On the CPU whatever the device, so that a seed means the same picture everywhere.
            generator = torch.Generator("cpu").manual_seed(job.seed)
            embeds, pooled, text_ids = pipe.encode_prompt(
                prompt=self._text(job.prompt),
                prompt_2=None,
                device=pipe.device,
                max_sequence_length=self.facts.text_tokens,
            )
            latents, image_ids = pipe.prepare_latents(
                1,
                pipe.transformer.config.in_channels // 4,  # a patch packs 2 × 2 latent pixels into channels
                job.height,
                job.width,
                embeds.dtype,
                pipe.device,
                generator,
            )
            guidance = None
            if pipe.transformer.config.guidance_embeds:
                guidance = torch.full([1], job.guidance_scale, device=pipe.device, dtype=torch.float32)
            scheduler = self._scheduler(job, patches=latents.shape[1])
            return State(
                job=job,
                shape=(*job.shape, embeds.shape[1]),
                latents=latents,
                timesteps=scheduler.timesteps,
                scheduler=scheduler,
                generator=generator,
                conditioning=Conditioning(embeds, pooled, guidance, text_ids, image_ids),
            )

    def step(self, states: Sequence[State[Conditioning]]) -> None:
        """One transformer pass over all states, then each state's own scheduler step."""
        with torch_errors_told():
            told = [state.conditioning for state in states]
            guidance = [c.guidance for c in told if c.guidance is not None]
            latents = torch.cat([state.latents for state in states])
            timesteps = torch.stack([state.timestep for state in states]).to(latents.dtype)
            predicted = self.pipeline.transformer(
                hidden_states=latents,
                timestep=timesteps / 1000,
                guidance=torch.cat(guidance) if guidance else None,
                pooled_projections=torch.cat([c.pooled for c in told]),
                encoder_hidden_states=torch.cat([c.embeds for c in told]),
                txt_ids=told[0].text_ids,
                img_ids=told[0].image_ids,
                return_dict=False,
            )[0]
            for state, prediction in zip(states, predicted.split(1), strict=True):
                state.advance(prediction)

    def finish(self, state: State[Conditioning]) -> Drawn:
        """Unpack the patches and decode; Flux's VAE has a shift beside its scale."""
        with torch_errors_told():
            pipe = self.pipeline
            # The stock unpacking is a static method of the pipeline, private by name only.
            latents = pipe._unpack_latents(state.latents, state.job.height, state.job.width, pipe.vae_scale_factor)
            return decode(pipe.vae, latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)

    def _text(self, prompt: str) -> str:
        return prompt.lower() if self.facts.lowercase_prompts else prompt

    def _scheduler(self, job: Job, patches: int) -> Any:
        """The job's scheduler with its timesteps set; the schedule shifts with the number of patches."""
        pipe = self.pipeline
        scheduler = make_scheduler(
            scheduler_of(self.facts, job.scheduler, job.num_inference_steps), like=pipe.scheduler
        )
        config = scheduler.config
        shift = calculate_shift(
            patches, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        sigmas = np.linspace(1.0, 1 / job.num_inference_steps, job.num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, device=pipe.device, mu=shift)
        scheduler.set_begin_index(0)
        return scheduler
