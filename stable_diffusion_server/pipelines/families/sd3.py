"""Stable Diffusion 3 and 3.5: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from stable_diffusion_server.errors import InvalidInput
from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    await_device,
    latent_mask,
    seeded,
    to_tensor,
    translate_torch_errors,
)
from stable_diffusion_server.pipelines.catalog import refine_steps_skipped, steps_skipped
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, LoraManager, digests_and_weights
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` is rows × tokens × channels (both CLIP encoders, then T5), `pooled` rows × channels (both CLIP encoders).
    """

    embeds: torch.Tensor
    pooled: torch.Tensor


class StableDiffusion3(DiffusersFamily):
    """Draws with the components of a `StableDiffusion3Pipeline`; tests compare it with the stock pipelines."""

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        controlnet: Any = None,
        loras: LoraManager | None = None,
        prompt_cache: PromptCache | None = None,
        tiling: VaeTiling = WHOLE,
    ) -> None:
        super().__init__(pipeline, spec, controlnet, loras, prompt_cache, tiling)
        # Models without T5 read the first 77 tokens only.
        self._count = token_counter(pipeline.tokenizer_3 or pipeline.tokenizer)

    def token_counter(self) -> Callable[[str], int]:
        """The count of T5's tokens; CLIP's shorter limit leaves out the end of a long prompt in a part of the rows."""
        return self._count

    def _prepared(self, request: DiffusionRequest) -> PipelineState[Conditioning]:
        """Encode the prompt and the input images, draw the noise, set the timesteps.

        Uses the generator in the order of the stock pipelines: latents of the input image, then noise. Raises
        `InvalidInput` for an unknown LoRA, or edges without a ControlNet.
        """
        if request.control is not None:
            raise InvalidInput(f"{self.spec.name} has no ControlNet here to follow edges with.", field="canny")
        with translate_torch_errors():
            skipped = steps_skipped(self.spec, request.num_inference_steps, request.strength) if request.image else 0
            loras = self.loras.use(request.loras, request.lora_digests)
            conditioning = self._encode(request, loras)
            dtype, generator = conditioning.embeds.dtype, seeded(request.seed)
            original, inpaint = None, None
            if request.image is not None:
                config = self.pipeline.vae.config
                latents = self._encoded(to_tensor(request.image, self.device), generator)
                original = ((latents - config.shift_factor) * config.scaling_factor).to(dtype)
            segments = [self._segment(request, skipped, generator, dtype)]
            if request.mask is not None and original is not None:
                inpaint = InpaintConstraint(latent_mask(request.mask, original), original)
            if request.refine:
                skipped = refine_steps_skipped(self.spec, request.num_inference_steps)
                # A seed of its own: adding the first pass's noise a second time is visible.
                segments.append(self._segment(request, skipped, seeded(request.seed + 1), dtype))
            return PipelineState(
                request=request,
                shape=(*request.shape, conditioning.embeds.shape[1], *(lora.digest for lora, _ in loras)),
                latents=segments[0].noise if original is None else segments[0].add_noise(original, 0),
                segments=tuple(segments),
                conditioning=conditioning,
                inpaint=inpaint,
                loras=loras,
            )

    def step(self, states: Sequence[PipelineState[Conditioning]]) -> None:
        """One transformer pass over the rows of all states, then guidance and a scheduler step for each state."""
        with translate_torch_errors():
            self.loras.switch(states[0].loras)
            conditionings = [state.conditioning for state in states]
            rows = [len(conditioning.embeds) for conditioning in conditionings]
            predicted = self.pipeline.transformer(
                hidden_states=torch.cat(
                    [state.latents.expand(count, -1, -1, -1) for state, count in zip(states, rows, strict=True)]
                ),
                timestep=torch.cat(
                    [state.timestep.reshape(1).expand(count) for state, count in zip(states, rows, strict=True)]
                ),
                encoder_hidden_states=torch.cat([conditioning.embeds for conditioning in conditionings]),
                pooled_projections=torch.cat([conditioning.pooled for conditioning in conditionings]),
                return_dict=False,
            )[0]
            for state, prediction in zip(states, predicted.split(rows), strict=True):
                if len(prediction) == 2:  # classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)
                    negative, positive = prediction.chunk(2)
                    prediction = negative + state.request.guidance_scale * (positive - negative)
                state.advance(prediction)
            await_device(predicted.device)

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras) -> Conditioning:
        guided = request.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.prompt_cache.get_or_create(
            (request.prompt, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=request.prompt,
                prompt_2=None,
                prompt_3=None,
                negative_prompt=request.negative_prompt,
                device=self.device,
                do_classifier_free_guidance=guided,
                clip_skip=self.spec.clip_skip or None,
                max_sequence_length=self.spec.text_tokens,
            ),
        )
        if not guided:
            return Conditioning(positive, pooled)
        return Conditioning(torch.cat([negative, positive]), torch.cat([negative_pooled, pooled]))

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`; draws its noise from `generator`."""
        pipe = self.pipeline
        height, width = request.height // pipe.vae_scale_factor, request.width // pipe.vae_scale_factor
        noise = torch.randn((1, pipe.transformer.config.in_channels, height, width), generator=generator, dtype=dtype)
        patch, config = pipe.transformer.config.patch_size, pipe.scheduler.config
        shift = calculate_shift(
            (height // patch) * (width // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        return self._flow_segment(request, skipped, noise.to(self.device), generator, None, shift)
