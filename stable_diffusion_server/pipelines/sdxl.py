"""The SDXL family: how a job becomes a state and a batch of states takes one step. Knows no other family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stable_diffusion_server.orders import Job
from stable_diffusion_server.pipelines.catalog import ModelFacts, scheduler_of
from stable_diffusion_server.pipelines.components import make_scheduler, token_counter
from stable_diffusion_server.pipelines.denoising import Drawn, State, decode, torch_errors_told


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the UNet is told: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` rows × tokens × channels, `pooled` rows × channels, `time_ids` rows × 6 (SDXL's size and crop facts).
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor

    @property
    def guided(self) -> bool:
        """Whether there is a negative row."""
        return len(self.embeds) == 2


class Sdxl:
    """Draws with a stock `StableDiffusionXLPipeline`'s own parts; equal to its `__call__` (tests/pipelines)."""

    def __init__(self, pipeline: Any, facts: ModelFacts) -> None:
        self.pipeline = pipeline
        self.facts = facts
        self._counters = [token_counter(pipeline.tokenizer), token_counter(pipeline.tokenizer_2)]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the longer of the two encoders' readings."""
        return max(count(prompt) for count in self._counters)

    def prepare(self, job: Job) -> State[Conditioning]:
        """Encode the prompt, draw the first noise, set the timesteps."""
        with torch_errors_told():
            pipe = self.pipeline
            device = pipe.device
            scheduler = make_scheduler(
                scheduler_of(self.facts, job.scheduler, job.num_inference_steps), like=pipe.scheduler
            )
            scheduler.set_timesteps(job.num_inference_steps, device=device)
            # On the CPU whatever the device, so that a seed means the same picture everywhere.
            generator = torch.Generator("cpu").manual_seed(job.seed)
            conditioning = self._encode(job)
            channels = pipe.unet.config.in_channels
            shape = (1, channels, job.height // pipe.vae_scale_factor, job.width // pipe.vae_scale_factor)
            noise = torch.randn(shape, generator=generator, dtype=conditioning.embeds.dtype)
            return State(
                job=job,
                shape=(*job.shape, conditioning.embeds.shape[1]),
                latents=noise.to(device) * scheduler.init_noise_sigma,
                timesteps=scheduler.timesteps,
                scheduler=scheduler,
                generator=generator,
                conditioning=conditioning,
            )

    def step(self, states: Sequence[State[Conditioning]]) -> None:
        """One UNet pass over the rows of all states, then each state's own guidance and scheduler step."""
        with torch_errors_told():
            told = [state.conditioning for state in states]
            rows = [len(conditioning.embeds) for conditioning in told]
            latents = [
                state.scheduler.scale_model_input(state.latents, state.timestep).expand(n, -1, -1, -1)
                for state, n in zip(states, rows, strict=True)
            ]
            timesteps = [state.timestep.expand(n) for state, n in zip(states, rows, strict=True)]
            predicted = self.pipeline.unet(
                torch.cat(latents),
                torch.cat(timesteps),
                encoder_hidden_states=torch.cat([c.embeds for c in told]),
                added_cond_kwargs={
                    "text_embeds": torch.cat([c.pooled for c in told]),
                    "time_ids": torch.cat([c.time_ids for c in told]),
                },
                return_dict=False,
            )[0]
            for state, prediction in zip(states, predicted.split(rows), strict=True):
                state.advance(_guide(prediction, state))

    def finish(self, state: State[Conditioning]) -> Drawn:
        """Decode the latents; SDXL's VAE is unscaled without a shift."""
        with torch_errors_told():
            vae = self.pipeline.vae
            return decode(vae, state.latents / vae.config.scaling_factor)

    def _encode(self, job: Job) -> Conditioning:
        guided = job.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            device=self.pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
        )
        # (original size, crop offset, target size), as the stock pipeline has them for a picture drawn whole.
        sizes = (job.height, job.width, 0, 0, job.height, job.width)
        time_ids = torch.tensor([sizes], dtype=positive.dtype, device=positive.device)
        if not guided:
            return Conditioning(positive, pooled, time_ids)
        return Conditioning(
            torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]), time_ids.expand(2, -1)
        )


def _guide(prediction: torch.Tensor, state: State[Conditioning]) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): negative + scale · (positive − negative)."""
    if not state.conditioning.guided:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + state.job.guidance_scale * (positive - negative)
