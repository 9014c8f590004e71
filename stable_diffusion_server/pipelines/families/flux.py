"""Flux: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

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
from stable_diffusion_server.pipelines.catalog import refine_steps_skipped, scheduler_of, steps_skipped
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput, transformer_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, LoraManager, digests_and_weights
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import make_scheduler, token_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning for one request.

    `embeds` is 1 × tokens × channels (T5), `pooled` 1 × channels (CLIP), `guidance` one number, for models distilled
    with it. `text_ids` (tokens × 3) and `image_ids` (patches × 3) are positions, equal for all requests of a shape.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor
    guidance: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor


class Flux(DiffusersFamily):
    """Generates images with the components of a `FluxPipeline`; tests compare it with the stock pipelines."""

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
        self._count = token_counter(pipeline.tokenizer_2)

    def token_counter(self) -> Callable[[str], int]:
        """The count of T5's tokens; CLIP's shorter limit only affects the pooled embedding."""
        count, spec = self._count, self.spec
        return lambda prompt: count(_text(spec, prompt))

    def _prepared(self, request: DiffusionRequest) -> PipelineState[Conditioning]:
        """Encode the prompt and the input images, draw the noise, set the timesteps.

        Uses the generator in the order of the stock pipelines: latents of the edges, latents of the input image, noise.
        Raises `InvalidInput` for a strength that leaves no step, an unknown LoRA, or edges without a ControlNet.
        """
        with translate_torch_errors():
            skipped = steps_skipped(self.spec, request.num_inference_steps, request.strength) if request.image else 0
            loras = self.loras.use(request.loras, request.lora_digests)
            conditioning = self._encode(request, loras)
            dtype = conditioning.embeds.dtype
            generator = seeded(request.seed)
            control = self._control(request, generator)
            original = self._latents_of(request.image, generator).to(dtype) if request.image is not None else None
            segments = [self._segment(request, skipped, generator, dtype)]
            latents = segments[0].noise if original is None else segments[0].add_noise(original, 0)
            inpaint = None
            if request.mask is not None and original is not None:
                channels = self.pipeline.vae.config.latent_channels
                like = torch.empty(1, 1, *self._size(request), device=original.device, dtype=dtype)
                mask = self._packed(latent_mask(request.mask, like).repeat(1, channels, 1, 1))
                inpaint = InpaintConstraint(mask, original)
            if request.refine:
                skipped = refine_steps_skipped(self.spec, request.num_inference_steps)
                # A seed of its own: adding the first pass's noise a second time is visible.
                segments.append(self._segment(request, skipped, seeded(request.seed + 1), dtype))
            return PipelineState(
                request=request,
                shape=(*request.shape, conditioning.embeds.shape[1], *(lora.digest for lora, _ in loras)),
                latents=latents,
                segments=tuple(segments),
                conditioning=conditioning,
                inpaint=inpaint,
                control=control,
                loras=loras,
            )

    def step(self, states: Sequence[PipelineState[Conditioning]]) -> None:
        """One transformer pass over all states, then a scheduler step for each state."""
        with translate_torch_errors():
            self.loras.switch(states[0].loras)
            conditionings = [state.conditioning for state in states]
            guidance = torch.cat([c.guidance for c in conditionings])
            latents = torch.cat([state.model_input for state in states])
            transformer = self.pipeline.transformer
            inputs = {
                "hidden_states": latents,
                "timestep": torch.stack([state.timestep for state in states]).to(latents.dtype) / 1000,
                "pooled_projections": torch.cat([c.pooled for c in conditionings]),
                "encoder_hidden_states": torch.cat([c.embeds for c in conditionings]),
                "txt_ids": conditionings[0].text_ids,
                "img_ids": conditionings[0].image_ids,
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

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        pipe, request = self.pipeline, state.request
        # The stock pipeline's static methods; it has no public ones for packing.
        unpacked: torch.Tensor = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
        return unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras = ()) -> Conditioning:
        pipe = self.pipeline
        device = self.device
        text = _text(self.spec, request.prompt)
        embeds, pooled, text_ids = self.prompt_cache.get_or_create(
            (text, digests_and_weights(loras)),
            lambda: pipe.encode_prompt(
                prompt=text, prompt_2=None, device=device, max_sequence_length=self.spec.text_tokens
            ),
        )
        height, width = self._size(request)
        image_ids = pipe._prepare_latent_image_ids(1, height // 2, width // 2, device, embeds.dtype)
        guidance = torch.full([1], request.guidance_scale, device=device, dtype=torch.float32)
        return Conditioning(embeds, pooled, guidance, text_ids, image_ids)

    def _control(self, request: DiffusionRequest, generator: torch.Generator) -> ControlNetInput | None:
        """The edges as the ControlNet takes them: packed latents, or pixels in -1..1."""
        if request.control is None:
            return None
        if self.controlnet is None:
            raise InvalidInput(f"{self.spec.name} has no ControlNet here to follow edges with.", field="canny")
        if self.controlnet.input_hint_block is None:
            hint = self._latents_of(request.control, generator)
        else:
            hint = 2 * to_tensor(request.control, self.device) - 1
        return ControlNetInput(hint.to(self.controlnet.dtype), request.control_scale)

    def _latents_of(self, image: ImageArray, generator: torch.Generator) -> torch.Tensor:
        """The packed latents of an image, scaled as the transformer takes them."""
        vae = self.pipeline.vae
        latents = self._encoded(to_tensor(image, self.device), generator)
        return self._packed((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents 1 × channels × h × w packed into patches of 2 × 2: 1 × (h·w / 4) × 4·channels."""
        packed: torch.Tensor = self.pipeline._pack_latents(latents, *latents.shape)
        return packed

    def _size(self, request: DiffusionRequest) -> tuple[int, int]:
        """Height and width of a request's latents, both even."""
        patch = self.pipeline.vae_scale_factor * 2
        return 2 * (request.height // patch), 2 * (request.width // patch)

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`; draws its noise from `generator`.

        The schedule depends on the number of patches.
        """
        pipe = self.pipeline
        device = self.device
        steps = request.num_inference_steps
        # A patch packs 2 × 2 latent pixels into channels.
        shape = (1, pipe.transformer.config.in_channels // 4, *self._size(request))
        noise = self._packed(torch.randn(shape, generator=generator, dtype=dtype).to(device))
        scheduler = make_scheduler(scheduler_of(self.spec, request.scheduler, steps), like=pipe.scheduler)
        config = scheduler.config
        shift = calculate_shift(
            noise.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=shift)
        first = skipped * scheduler.order
        scheduler.set_begin_index(first)
        return DenoisingSegment(scheduler, scheduler.timesteps[first:], generator, noise)


def _text(spec: ModelSpec, prompt: str) -> str:
    return prompt.lower() if spec.lowercase_prompts else prompt
