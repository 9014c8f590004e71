"""The Flux family: how a job becomes a state and a batch of states takes one step. Knows no other family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
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
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput, transformer_residuals
from stable_diffusion_server.pipelines.conditioning.lora import LoraManager, LorasInUse, by_digest
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.latent_preview import LatentPreviewer
from stable_diffusion_server.pipelines.loading.schedulers import make_scheduler
from stable_diffusion_server.pipelines.loading.tokenizers import token_counter
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the transformer is told of one job.

    `embeds` 1 × tokens × channels (T5), `pooled` 1 × channels (CLIP), `guidance` 1, for
    models distilled with it; `text_ids` tokens × 3 and `image_ids` patches × 3 are positions, equal for a shape.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    guidance: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor


class Flux:
    """Draws with a stock `FluxPipeline`'s own parts; equal to the stock calls (tests/pipelines).

    `controlnet` shares nothing with the pipeline and may be `None`; then guided jobs are refused.
    """

    def __init__(
        self,
        pipeline: Any,
        facts: ModelSpec,
        controlnet: Any = None,
        adapters: LoraManager | None = None,
        embeddings: PromptCache | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.facts = facts
        self.controlnet = controlnet
        self.adapters = adapters or LoraManager(pipeline)
        self.embeddings = PromptCache() if embeddings is None else embeddings
        self._previewer = LatentPreviewer(pipeline.vae, self._unscaled)
        self._count = token_counter(pipeline.tokenizer_2)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where it draws; looked up once it is settled, since that takes a walk over every module there is."""
        device: torch.device = self.pipeline._execution_device
        return device

    def count_tokens(self, prompt: str) -> int:
        """Tokens of T5, which reads the whole prompt; CLIP's pooled reading only sets the mood."""
        return self._count(self._text(prompt))

    def prepare(self, job: DiffusionRequest) -> PipelineState[Conditioning]:
        """Encode the prompt and the pictures, draw the first noise, set the timesteps.

        Draws from the generator in the order of the stock pipelines: the edges' latents, the picture's latents, the
        noise. Raises `InvalidInput` for a strength that leaves no step, an unknown adapter, or edges without a
        ControlNet.
        """
        with translate_torch_errors():
            skipped = steps_skipped(self.facts, job.num_inference_steps, job.strength) if job.image else 0
            adapters = self.adapters.use(job.loras, job.lora_digests)
            conditioning = self._encode(job, adapters)
            dtype = conditioning.embeds.dtype
            generator = seeded(job.seed)
            control = self._control(job, generator)
            picture = self._latents_of(job.image, generator).to(dtype) if job.image is not None else None
            stages = [self._stage(job, skipped, generator, dtype)]
            latents = stages[0].noise if picture is None else stages[0].noised(picture, 0)
            keep = None
            if job.mask is not None and picture is not None:
                channels = self.pipeline.vae.config.latent_channels
                like = torch.empty(1, 1, *self._size(job), device=picture.device, dtype=dtype)
                keep = InpaintConstraint(self._packed(latent_mask(job.mask, like).repeat(1, channels, 1, 1)), picture)
            if job.refine:
                skipped = refine_steps_skipped(self.facts, job.num_inference_steps)
                # Noise of its own: the first pass's noise, added twice, shows.
                stages.append(self._stage(job, skipped, seeded(job.seed + 1), dtype))
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
        """One transformer pass over all states, then each state's own scheduler step."""
        with translate_torch_errors():
            self.adapters.switch(states[0].adapters)
            told = [state.conditioning for state in states]
            guidance = torch.cat([c.guidance for c in told])
            latents = torch.cat([state.model_input for state in states])
            transformer = self.pipeline.transformer
            inputs = {
                "hidden_states": latents,
                "timestep": torch.stack([state.timestep for state in states]).to(latents.dtype) / 1000,
                "pooled_projections": torch.cat([c.pooled for c in told]),
                "encoder_hidden_states": torch.cat([c.embeds for c in told]),
                "txt_ids": told[0].text_ids,
                "img_ids": told[0].image_ids,
            }
            controls = [state.control for state in states]
            predicted = transformer(
                **inputs,
                **transformer_residuals(self.controlnet, inputs, guidance, controls),
                guidance=guidance if transformer.config.guidance_embeds else None,
                return_dict=False,
            )[0]
            for state, prediction in zip(states, predicted.split(1), strict=True):
                state.advance(prediction)
            await_device(predicted.device)

    def finish(self, state: PipelineState[Conditioning]) -> DecodedImage:
        """Unpack the patches and decode; Flux's VAE has a shift beside its scale."""
        with translate_torch_errors():
            return decode(self.pipeline.vae, self._unscaled(state, state.latents))

    def preview(self, state: PipelineState[Conditioning]) -> NDArray[np.uint8]:
        """A small picture of where a state stands, made without decoding."""
        return self._previewer.preview(state)

    def shrink(self) -> bool:
        """Decode in smaller tiles from now on; false when they are as small as they may be."""
        return shrink_tiles(self.pipeline.vae)

    def _unscaled(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        pipe, job = self.pipeline, state.job
        # The stock packing and unpacking are static methods of the pipeline, private by name only.
        unpacked: torch.Tensor = pipe._unpack_latents(latents, job.height, job.width, pipe.vae_scale_factor)
        return unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    def _text(self, prompt: str) -> str:
        return prompt.lower() if self.facts.lowercase_prompts else prompt

    def _encode(self, job: DiffusionRequest, adapters: LorasInUse = ()) -> Conditioning:
        pipe = self.pipeline
        device = self.device
        text = self._text(job.prompt)
        embeds, pooled, text_ids = self.embeddings.of(
            (text, by_digest(adapters)),
            lambda: pipe.encode_prompt(
                prompt=text, prompt_2=None, device=device, max_sequence_length=self.facts.text_tokens
            ),
        )
        height, width = self._size(job)
        image_ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, device, embeds.dtype)
        guidance = torch.full([1], job.guidance_scale, device=device, dtype=torch.float32)
        return Conditioning(embeds, pooled, guidance, text_ids, image_ids)

    def _control(self, job: DiffusionRequest, generator: torch.Generator) -> ControlNetInput | None:
        """The hint as this kind of ControlNet takes it: latents of the edges, or their pixels."""
        if job.control is None:
            return None
        if self.controlnet is None:
            raise InvalidInput(f"{self.facts.name} has no ControlNet here to follow edges with.", field="canny")
        if self.controlnet.input_hint_block is None:
            hint = self._latents_of(job.control, generator)
        else:
            hint = 2 * to_tensor(job.control, self.device) - 1
        return ControlNetInput(hint.to(self.controlnet.dtype), job.control_scale)

    def _latents_of(self, picture: ImageArray, generator: torch.Generator) -> torch.Tensor:
        """The packed latents of a picture, scaled as the transformer sees them."""
        vae = self.pipeline.vae
        latents = encode(vae, to_tensor(picture, self.device), generator)
        return self._packed((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents 1 × channels × h × w as patches of 2 × 2: 1 × (h·w / 4) × 4·channels."""
        packed: torch.Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def _size(self, job: DiffusionRequest) -> tuple[int, int]:
        """Height and width of the job's latents, both even."""
        patch = self.pipeline.vae_scale_factor * 2
        return 2 * (job.height // patch), 2 * (job.width // patch)

    def _stage(
        self, job: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """A run of the job's steps without the first `skipped`; draws its noise from `generator`.

        The schedule shifts with the number of patches.
        """
        pipe = self.pipeline
        device = self.device
        steps = job.num_inference_steps
        # A patch packs 2 × 2 latent pixels into channels.
        shape = (1, pipe.transformer.config.in_channels // 4, *self._size(job))
        noise = self._packed(torch.randn(shape, generator=generator, dtype=dtype).to(device))
        scheduler = make_scheduler(scheduler_of(self.facts, job.scheduler, steps), like=pipe.scheduler)
        config = scheduler.config
        shift = calculate_shift(
            noise.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=shift)
        first = skipped * scheduler.order
        scheduler.set_begin_index(first)
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise)
