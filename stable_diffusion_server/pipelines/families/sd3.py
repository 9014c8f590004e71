"""Stable Diffusion 3 and 3.5: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    by_row,
    classifier_free,
    latent_mask,
    seeded,
    to_tensor,
)
from stable_diffusion_server.pipelines.conditioning.control_groups import row_controls
from stable_diffusion_server.pipelines.conditioning.controlnet import joint_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.controlnet_cache import named_controls
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import token_counter
from stable_diffusion_server.pipelines.native_family import NativeFamily
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.pipelines.stock.position_tables import check_size
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning: rows are [negative, positive] with classifier-free guidance, [positive] without.

    `embeds` is rows × tokens × channels (both CLIP encoders, then T5), `pooled` rows × channels (both CLIP encoders).
    """

    embeds: torch.Tensor
    pooled: torch.Tensor


class StableDiffusion3(NativeFamily[Conditioning]):
    """Draws with the components of a `StableDiffusion3Pipeline`; tests compare it with the stock pipelines."""

    @functools.cached_property
    def _count(self) -> Callable[[str], int]:
        # Models without T5 read the first 77 tokens only.
        return token_counter(self.pipeline.tokenizer_3 or self.pipeline.tokenizer)

    def token_counter(self) -> Callable[[str], int]:
        """The count of T5's tokens; CLIP's shorter limit leaves out the end of a long prompt in a part of the rows."""
        return self._count

    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[Conditioning]:
        check_size(self.pipeline, request.width, request.height)
        conditioning = self._encode(request, loras)
        dtype, generator = conditioning.embeds.dtype, seeded(request.seed)
        original, inpaint = None, None
        scale = self.pipeline.vae_scale_factor
        controls = named_controls(request.controls, self.controlnets, self._hint, self.device, scale)
        if request.starts_from_image:
            config = self.pipeline.vae.config
            latents = self._original(request, generator)
            original = ((latents - config.shift_factor) * config.scaling_factor).to(dtype)
        first = self._segment(request, skipped, generator, dtype)
        if request.mask is not None and original is not None:
            mask = latent_mask(request.mask, original, soft=request.soft)
            inpaint = InpaintConstraint(mask, original, request.soft)
        start = None if original is None else first.add_noise(original, 0)
        lengths = (conditioning.embeds.shape[1],)
        return self._state(
            request, loras, conditioning, first, latents=start, lengths=lengths, inpaint=inpaint, controls=controls
        )

    def _adapt(self, network: Any) -> None:
        """Give a ControlNet without positions, as SD 3.5's, those of the model."""
        if not network.config.use_pos_embed:
            network._get_pos_embed_from_transformer(self.pipeline.transformer)

    def _hint(self, network: Any, image: ImageArray, mask: ImageArray | None) -> torch.Tensor:
        """The latents of a control image, as a ControlNet takes them."""
        config = self.pipeline.vae.config
        # As in the stock pipeline: networks that take zeros as the pooled prompt were trained without the shift.
        shift = 0.0 if network.config.force_zeros_for_pooled_projection else config.shift_factor
        return (self._encoded(to_tensor(image, self.device), None) - shift) * config.scaling_factor

    def _predicted(self, states: Sequence[PipelineState[Conditioning]]) -> Sequence[torch.Tensor]:
        conditionings = [state.conditioning for state in states]
        rows = [len(conditioning.embeds) for conditioning in conditionings]
        inputs = {
            "hidden_states": by_row([state.latents for state in states], rows),
            "timestep": by_row([state.timestep.reshape(1) for state in states], rows),
            "encoder_hidden_states": torch.cat([conditioning.embeds for conditioning in conditionings]),
            "pooled_projections": torch.cat([conditioning.pooled for conditioning in conditionings]),
        }
        controls = [
            units for state, n in zip(states, rows, strict=True) for units in row_controls(state, n, positive=n - 1)
        ]
        transformer = self.pipeline.transformer
        patch, (height, width) = transformer.config.patch_size, states[0].latents.shape[-2:]
        residuals = joint_residuals(
            inputs, controls, len(transformer.transformer_blocks), (height // patch, width // patch)
        )
        with self.loras.applied_by_row([state.loras for state in states], rows):
            predicted = transformer(**inputs, **residuals, return_dict=False)[0]
        return [
            classifier_free(prediction, state.request.guidance_scale)
            for state, prediction in zip(states, predicted.split(rows), strict=True)
        ]

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        config = self.pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras) -> Conditioning:
        guided = request.guidance_scale > 1
        positive, negative, pooled, negative_pooled = self.prompt_cache.get_or_create(
            (request.prompt, request.prompt_2, request.negative_prompt, guided, digests_and_weights(loras)),
            lambda: self.pipeline.encode_prompt(
                prompt=request.prompt,
                prompt_2=request.prompt_2,
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
        pipe = self.pipeline
        height, width = request.height // pipe.vae_scale_factor, request.width // pipe.vae_scale_factor
        noise = starting_noise(request, (1, pipe.transformer.config.in_channels, height, width), generator, dtype)
        patch, config = pipe.transformer.config.patch_size, pipe.scheduler.config
        shift = calculate_shift(
            (height // patch) * (width // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        return self._flow_segment(request, skipped, noise.to(self.device), generator, None, shift)
