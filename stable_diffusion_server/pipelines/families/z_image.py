"""Z-Image: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

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
from stable_diffusion_server.pipelines.conditioning.controlnet import ControlNetInput, layer_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, LoraManager, digests_and_weights
from stable_diffusion_server.pipelines.conditioning.prompt_cache import PromptCache
from stable_diffusion_server.pipelines.diffusers_family import DiffusersFamily
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import chat_counter
from stable_diffusion_server.pipelines.model_spec import ModelSpec
from stable_diffusion_server.pipelines.vae_tiles import WHOLE, VaeTiling
from stable_diffusion_server.types import DiffusionRequest


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning: captions of the rows, [positive, negative] with guidance, else [positive].

    Each is tokens × channels, of its own length.
    """

    captions: tuple[torch.Tensor, ...]


class ZImage(DiffusersFamily):
    """Draws with the components of a `ZImagePipeline`; tests compare it with the stock pipelines.

    The guidance scale is the stock pipeline's, positive + scale · (positive − negative): 4 here is 5 with SDXL, and 0
    is none.
    """

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
        if controlnet is not None:  # it has no embedders of its own
            type(controlnet).from_transformer(controlnet, pipeline.transformer)
        self._count = chat_counter(pipeline.tokenizer, thinking=True)

    def token_counter(self) -> Callable[[str], int]:
        """The count of Qwen3's tokens, those of the chat template included."""
        return self._count

    def _prepared(self, request: DiffusionRequest) -> PipelineState[Conditioning]:
        """Encode the prompt and the input images, draw the noise, set the timesteps.

        Uses the generator in the order of the stock pipelines: latents of the input image, then noise. Raises
        `InvalidInput` for an unknown LoRA, or edges without a ControlNet.
        """
        with translate_torch_errors():
            skipped = steps_skipped(self.spec, request.num_inference_steps, request.strength) if request.image else 0
            loras = self.loras.use(request.loras, request.lora_digests)
            conditioning = self._encode(request, loras)
            generator = seeded(request.seed)
            control = self._control(request)
            original, inpaint, dtype = None, None, torch.float32
            if request.image is not None:
                dtype = conditioning.captions[0].dtype  # only pictures from text start in fp32
                original = self._latents_of(request, generator).to(dtype)
            segments = [self._segment(request, skipped, generator, dtype)]
            if request.mask is not None and original is not None:
                inpaint = InpaintConstraint(latent_mask(request.mask, original), original)
            if request.refine:
                skipped = refine_steps_skipped(self.spec, request.num_inference_steps)
                # A seed of its own: adding the first pass's noise a second time is visible.
                segments.append(self._segment(request, skipped, seeded(request.seed + 1), dtype))
            return PipelineState(
                request=request,
                shape=(*request.shape, *(lora.digest for lora, _ in loras)),
                latents=segments[0].noise if original is None else segments[0].add_noise(original, 0),
                segments=tuple(segments),
                conditioning=conditioning,
                inpaint=inpaint,
                control=control,
                loras=loras,
            )

    def step(self, states: Sequence[PipelineState[Conditioning]]) -> None:
        """One transformer pass over the rows of all states, then guidance and a scheduler step for each state.

        Captions are padded to the longest. Noise levels are counted from 0, all noise, to 1.
        """
        with translate_torch_errors():
            self.loras.switch(states[0].loras)
            transformer = self.pipeline.transformer
            rows = [len(state.conditioning.captions) for state in states]
            times = [state.timestep.reshape(1).expand(count) for state, count in zip(states, rows, strict=True)]
            by_row = [state for state, count in zip(states, rows, strict=True) for _ in range(count)]
            pictures = [state.latents[0].to(transformer.dtype).unsqueeze(1) for state in by_row]
            captions = [caption for state in states for caption in state.conditioning.captions]
            levels = (1000 - torch.cat(times)) / 1000
            controls = [state.control for state in by_row]
            residuals = layer_residuals(self.controlnet, pictures, levels, captions, controls)
            predicted = transformer(pictures, levels, captions, return_dict=False, **residuals)[0]
            for state, count in zip(states, rows, strict=True):
                own, predicted = [row.float() for row in predicted[:count]], predicted[count:]
                velocity = own[0] if count == 1 else own[0] + state.request.guidance_scale * (own[0] - own[1])
                state.advance(-velocity.squeeze(1)[None])
            await_device(states[0].latents.device)

    def _control(self, request: DiffusionRequest) -> ControlNetInput | None:
        """The edges as the ControlNet takes them: latents, and zeros for what only inpainting has."""
        if request.control is None:
            return None
        if self.controlnet is None:
            raise InvalidInput(f"{self.spec.name} has no ControlNet here to follow edges with.", field="canny")
        config = self.pipeline.vae.config
        latents = self._encoded(to_tensor(request.control, self.device), None)
        hint = ((latents - config.shift_factor) * config.scaling_factor).to(self.controlnet.dtype).unsqueeze(2)
        lacking = self.controlnet.config.control_in_dim - hint.shape[1]
        hint = torch.cat([hint, hint.new_zeros(1, lacking, *hint.shape[2:])], dim=1) if lacking else hint
        return ControlNetInput(hint, request.control_scale)

    def _vae_latents(self, state: PipelineState[Conditioning], latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        return latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor

    def _encode(self, request: DiffusionRequest, loras: ActiveLoras) -> Conditioning:
        prompts = [request.prompt, request.negative_prompt or ""] if request.guidance_scale > 0 else [request.prompt]
        return Conditioning(tuple(self._encode_one(prompt, loras) for prompt in prompts))

    def _encode_one(self, prompt: str, loras: ActiveLoras) -> torch.Tensor:
        return self.prompt_cache.get_or_create(
            (prompt, digests_and_weights(loras)),
            lambda: tuple(
                self.pipeline.encode_prompt(
                    prompt=prompt,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.spec.text_tokens,
                )[0]
            ),
        )[0]

    def _latents_of(self, request: DiffusionRequest, generator: torch.Generator) -> torch.Tensor:
        """A sample of the input image's latents, scaled as the transformer takes them."""
        config = self.pipeline.vae.config
        latents = self._encoded(to_tensor(request.image, self.device), generator) if request.image else None
        if latents is None:
            raise ValueError("the request has no input image")
        return (latents - config.shift_factor) * config.scaling_factor

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        """The request's steps without the first `skipped`; draws its noise from `generator`."""
        pipe = self.pipeline
        patch = pipe.vae_scale_factor * 2
        height, width = request.height // patch, request.width // patch
        shape = (1, pipe.transformer.in_channels, 2 * height, 2 * width)
        noise = torch.randn(shape, generator=generator, dtype=dtype).to(self.device)
        config = pipe.scheduler.config
        shift = calculate_shift(
            height * width,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = get_default_z_image_sigmas(request.num_inference_steps)
        return self._flow_segment(request, skipped, noise, generator, sigmas, shift)
