"""The SDXL family: how a job becomes a state and a batch of states takes one step. Knows no other family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    DecodedImage,
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    await_device,
    decode,
    encode,
    latent_mask,
    seeded,
    shrink_tiles,
    to_tensor,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.catalog import (
    ModelSpec,
    refine_steps_skipped,
    scheduler_of,
    steps_skipped,
)
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput, check_grid, unet_residuals
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager, LorasInUse, by_digest
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.latent_preview import LatentPreviewer
from stable_diffusion_server.pipelines.loading.schedulers import make_scheduler, set_timesteps
from stable_diffusion_server.pipelines.loading.tokenizers import token_counter
from stable_diffusion_server.types import DiffusionRequest


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
    """Draws with a stock `StableDiffusionXLPipeline`'s own parts; equal to the stock calls (tests/pipelines).

    `controlnet` shares nothing with the pipeline and may be `None`; then guided jobs are refused. Raises
    `ModelLoadError` when the two were not made for one another.
    """

    def __init__(
        self,
        pipeline: Any,
        facts: ModelSpec,
        controlnet: Any = None,
        adapters: LoraManager | None = None,
        embeddings: PromptCache | None = None,
    ) -> None:
        if controlnet is not None:
            check_grid(controlnet, pipeline.vae_scale_factor)
        self.pipeline = pipeline
        self.facts = facts
        self.controlnet = controlnet
        self.adapters = adapters or LoraManager(pipeline)
        self.embeddings = PromptCache() if embeddings is None else embeddings
        self._previewer = LatentPreviewer(pipeline.vae, self._unscaled)
        self._counters = [token_counter(pipeline.tokenizer), token_counter(pipeline.tokenizer_2)]

    @functools.cached_property
    def device(self) -> torch.device:
        """Where it draws; looked up once it is settled, since that takes a walk over every module there is."""
        device: torch.device = self.pipeline._execution_device
        return device

    def count_tokens(self, prompt: str) -> int:
        """Tokens of the longer of the two encoders' readings."""
        return max(count(prompt) for count in self._counters)

    def prepare(self, job: DiffusionRequest) -> PipelineState[Conditioning]:
        """Encode the prompt and the pictures, draw the first noise, set the timesteps.

        Draws from the generator in the order of the stock pipelines: the picture's latents, then the noise. Raises
        `InvalidInput` for a strength that leaves no step, an unknown adapter, or edges without a ControlNet.
        """
        with translate_torch_errors():
            pipe = self.pipeline
            skipped = steps_skipped(self.facts, job.num_inference_steps, job.strength) if job.image else 0
            control = self._control(job)
            adapters = self.adapters.use(job.loras, job.lora_digests)
            conditioning = self._encode(job, adapters)
            generator = seeded(job.seed)
            picture = None
            if job.image is not None:
                scale = pipe.vae.config.scaling_factor
                pixels = to_tensor(job.image, self.device)
                picture = scale * encode(pipe.vae, pixels, generator).to(conditioning.embeds.dtype)
            stages = [self._stage(job, skipped, generator, conditioning.embeds.dtype)]
            latents, keep = self._begin(job, stages[0], picture)
            if keep is not None:
                # A UNet with 9 channels would see the masked picture's latents; the stock pipeline samples them
                # for this one as well, and what ancestral schedulers draw later depends on it.
                torch.randn(latents.shape, generator=generator, dtype=pipe.vae.dtype)
            if job.refine:
                skipped = refine_steps_skipped(self.facts, job.num_inference_steps)
                # Noise of its own: the first pass's noise, added twice, shows.
                stages.append(self._stage(job, skipped, seeded(job.seed + 1), conditioning.embeds.dtype))
            return PipelineState(
                job=job,
                shape=(*job.shape, conditioning.embeds.shape[1], *(held.digest for held, _ in adapters)),
                latents=latents,
                stages=tuple(stages),
                conditioning=conditioning,
                keep=keep,
                control=control,
                adapters=adapters,
            )

    def step(self, states: Sequence[PipelineState[Conditioning]]) -> None:
        """One UNet pass over the rows of all states, then each state's own guidance and scheduler step."""
        with translate_torch_errors():
            self.adapters.switch(states[0].adapters)
            told = [state.conditioning for state in states]
            rows = [len(conditioning.embeds) for conditioning in told]
            inputs = {
                "sample": _by_row([state.model_input for state in states], rows),
                "timestep": _by_row([state.timestep.reshape(1) for state in states], rows).to(self.device),
                "encoder_hidden_states": torch.cat([c.embeds for c in told]),
                "added_cond_kwargs": {
                    "text_embeds": torch.cat([c.pooled for c in told]),
                    "time_ids": torch.cat([c.time_ids for c in told]),
                },
            }
            controls = [state.control for state, n in zip(states, rows, strict=True) for _ in range(n)]
            residuals = unet_residuals(self.controlnet, inputs, controls)
            predicted = self.pipeline.unet(**inputs, **residuals, return_dict=False)[0]
            for state, prediction in zip(states, predicted.split(rows), strict=True):
                state.advance(_guide(prediction, state))
            await_device(predicted.device)

    def finish(self, state: PipelineState[Conditioning]) -> DecodedImage:
        """Decode the latents; SDXL's VAE is unscaled without a shift."""
        with translate_torch_errors():
            return decode(self.pipeline.vae, self._unscaled(state, state.latents))

    def preview(self, state: PipelineState[Conditioning]) -> NDArray[np.uint8]:
        """A small picture of where a state stands, made without decoding."""
        return self._previewer.preview(state)

    def shrink(self) -> bool:
        """Decode in smaller tiles from now on; false when they are as small as they may be."""
        return shrink_tiles(self.pipeline.vae)

    def _unscaled(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        return latents / self.pipeline.vae.config.scaling_factor

    def _stage(
        self, job: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """A run of the job's steps without the first `skipped`; draws its noise from `generator`."""
        pipe = self.pipeline
        facts = scheduler_of(self.facts, job.scheduler, job.num_inference_steps)
        scheduler = make_scheduler(facts, like=pipe.scheduler)
        # On the CPU, where schedulers look at them: on a device each look would wait for what it computes.
        set_timesteps(scheduler, job.num_inference_steps, torch.device("cpu"))
        first = skipped * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        size = (job.height // pipe.vae_scale_factor, job.width // pipe.vae_scale_factor)
        noise = torch.randn((1, pipe.unet.config.in_channels, *size), generator=generator, dtype=dtype)
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise.to(self.device))

    def _begin(
        self, job: DiffusionRequest, stage: DenoisingSegment, picture: torch.Tensor | None
    ) -> tuple[torch.Tensor, InpaintConstraint | None]:
        """The latents before the first step, and what of the picture's latents is kept."""
        keep = (
            InpaintConstraint(latent_mask(job.mask, picture), picture)
            if job.mask is not None and picture is not None
            else None
        )
        if picture is None or (keep is not None and job.strength == 1):
            return stage.noise * stage.scheduler.init_noise_sigma, keep
        return stage.noised(picture, 0), keep

    def _control(self, job: DiffusionRequest) -> ControlNetInput | None:
        if job.control is None:
            return None
        if self.controlnet is None:
            raise InvalidInput(f"{self.facts.name} has no ControlNet here to follow edges with.", field="canny")
        hint = to_tensor(job.control, self.device).to(self.controlnet.dtype)
        return ControlNetInput(hint, job.control_scale)

    def _encode(self, job: DiffusionRequest, adapters: LorasInUse = ()) -> Conditioning:
        guided = job.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.embeddings.of(
            (job.prompt, job.negative_prompt, guided, by_digest(adapters)),
            lambda: self.pipeline.encode_prompt(
                prompt=job.prompt,
                negative_prompt=job.negative_prompt,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            ),
        )
        # (original size, crop offset, target size), as the stock pipeline has them for a picture drawn whole.
        sizes = (job.height, job.width, 0, 0, job.height, job.width)
        time_ids = torch.tensor([sizes], dtype=positive.dtype, device=positive.device)
        if not guided:
            return Conditioning(positive, pooled, time_ids)
        return Conditioning(
            torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]), time_ids.expand(2, -1)
        )


def _by_row(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """One batch of tensors of one row each, the i-th repeated `rows[i]` times."""
    return torch.cat([tensor for tensor, n in zip(tensors, rows, strict=True) for _ in range(n)])


def _guide(prediction: torch.Tensor, state: PipelineState[Conditioning]) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): negative + scale · (positive − negative)."""
    if not state.conditioning.guided:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + state.job.guidance_scale * (positive - negative)
