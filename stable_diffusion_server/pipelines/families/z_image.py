"""Z-Image: how a request becomes a state, and how a batch of states takes one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas

from stable_diffusion_server.pipelines.base import (
    DenoisingSegment,
    InpaintConstraint,
    PipelineState,
    latent_mask,
    seeded,
    to_tensor,
)
from stable_diffusion_server.pipelines.conditioning.control_groups import ControlNetInput, row_controls
from stable_diffusion_server.pipelines.conditioning.controlnet import layer_residuals
from stable_diffusion_server.pipelines.conditioning.lora import ActiveLoras, digests_and_weights
from stable_diffusion_server.pipelines.controlnet_cache import named_controls
from stable_diffusion_server.pipelines.loading.schedulers_and_tokenizers import chat_counter
from stable_diffusion_server.pipelines.native_family import NativeFamily
from stable_diffusion_server.pipelines.starting_noise import starting_noise
from stable_diffusion_server.pipelines.stock.position_tables import check_size
from stable_diffusion_server.types import DiffusionRequest, ImageArray


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The transformer's conditioning: captions of the rows, [positive, negative] with guidance, else [positive].

    Each is tokens × channels, of its own length.
    """

    captions: tuple[torch.Tensor, ...]


class ZImage(NativeFamily[Conditioning]):
    """Draws with the components of a `ZImagePipeline`; tests compare it with the stock pipelines.

    The guidance scale is the stock pipeline's, positive + scale · (positive − negative): 4 here is 5 with SDXL, and 0
    is none.
    """

    _mixes_loras = False  # its embedders take the patches of all rows as one row

    def _adapt_controlnet(self) -> None:
        if self.controlnet is not None:
            self._adapt(self.controlnet)

    def _adapt(self, network: Any) -> None:
        """Give a ControlNet, which has no embedders of its own, those of the model."""
        type(network).from_transformer(network, self.pipeline.transformer)

    @functools.cached_property
    def _count(self) -> Callable[[str], int]:
        return chat_counter(self.pipeline.tokenizer, thinking=True)

    def token_counter(self) -> Callable[[str], int]:
        """The count of Qwen3's tokens, those of the chat template included."""
        return self._count

    def _state_of(self, request: DiffusionRequest, skipped: int, loras: ActiveLoras) -> PipelineState[Conditioning]:
        check_size(self.pipeline, request.width, request.height)
        conditioning = self._encode(request, loras)
        generator = seeded(request.seed)
        controls = self._controls(request)
        original, inpaint, dtype = None, None, torch.float32
        shown = request.mask is not None and any(self._shows_mask(control.network) for control in controls)
        if request.starts_from_image:
            # Pictures from text start in fp32, and so does what is repainted by the ControlNet.
            dtype = dtype if shown else conditioning.captions[0].dtype
            drawn_from = None if shown else generator
            original = self._scaled(self._original(request, drawn_from)).to(dtype)
        first = self._segment(request, skipped, generator, dtype)
        if request.mask is not None and original is not None and not shown:
            mask = latent_mask(request.mask, original, soft=request.soft)
            inpaint = InpaintConstraint(mask, original, request.soft)
        start = None if original is None else first.add_noise(original, 0)
        return self._state(request, loras, conditioning, first, latents=start, inpaint=inpaint, controls=controls)

    def _predicted(self, states: Sequence[PipelineState[Conditioning]]) -> Sequence[torch.Tensor]:
        """Captions are padded to the longest. Noise levels are counted from 0, all noise, to 1."""
        transformer = self.pipeline.transformer
        rows = [len(state.conditioning.captions) for state in states]
        by_row = [state for state, count in zip(states, rows, strict=True) for _ in range(count)]
        pictures = [state.latents[0].to(transformer.dtype).unsqueeze(1) for state in by_row]
        captions = [caption for state in states for caption in state.conditioning.captions]
        levels = (1000 - torch.stack([state.timestep for state in by_row])) / 1000
        controls = [
            units for state, count in zip(states, rows, strict=True) for units in row_controls(state, count, positive=0)
        ]
        with self.loras.applied(states[0].loras):
            residuals = layer_residuals(pictures, levels, captions, controls)
            predicted = iter(transformer(pictures, levels, captions, return_dict=False, **residuals)[0])
        found = []
        for state, count in zip(states, rows, strict=True):
            velocity, *negative = (next(predicted).float() for _ in range(count))
            if negative:
                velocity = velocity + state.request.guidance_scale * (velocity - negative[0])
            found.append(-velocity.squeeze(1)[None])
        return found

    def _controls(self, request: DiffusionRequest) -> list[ControlNetInput]:
        """The request's edges for the model's own ControlNet, then its control units."""

        def hint_of(network: Any, image: ImageArray, mask: ImageArray | None) -> torch.Tensor:
            return self._hint(network, image, request)

        inputs = []
        if request.control is not None:
            hint = hint_of(self.controlnet, request.control, None)
            inputs.append(ControlNetInput(self.controlnet, hint, request.control_scale))
        scale = self.pipeline.vae_scale_factor
        return [*inputs, *named_controls(request.controls, self.controlnets, hint_of, self.device, scale)]

    def _hint(self, network: Any, image: ImageArray, request: DiffusionRequest) -> torch.Tensor:
        """A control image as a ControlNet takes it: latents, then what is kept in inpainting, otherwise zeros."""
        hint = self._scaled(self._encoded(to_tensor(image, self.device), None))
        if request.image is not None and request.mask is not None and self._shows_mask(network):
            hidden = (to_tensor(request.mask, self.device)[:, :1] >= 0.5).float()
            # Grey where the image is hidden.
            visible = to_tensor(request.image, self.device) * (1 - hidden) + 0.5 * hidden
            kept = self._scaled(self._encoded(visible, None))
            hint = torch.cat([hint, 1 - latent_mask(request.mask, hint), kept], dim=1)
        hint = hint.to(network.dtype).unsqueeze(2)
        lacking = network.config.control_in_dim - hint.shape[1]
        return torch.cat([hint, hint.new_zeros(1, lacking, *hint.shape[2:])], dim=1) if lacking else hint

    def _shows_mask(self, network: Any) -> bool:
        """Whether what is repainted and what is kept is an input of a ControlNet, as it is from version 2.0 on.

        As in the stock pipeline nothing else keeps it while steps are taken.
        """
        return bool(network.config.control_in_dim > self.pipeline.transformer.in_channels)

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

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents in the scale of the transformer."""
        config = self.pipeline.vae.config
        scaled: torch.Tensor = (latents - config.shift_factor) * config.scaling_factor
        return scaled

    def _segment(
        self, request: DiffusionRequest, skipped: int, generator: torch.Generator, dtype: torch.dtype
    ) -> DenoisingSegment:
        pipe = self.pipeline
        patch = pipe.vae_scale_factor * 2
        height, width = request.height // patch, request.width // patch
        shape = (1, pipe.transformer.in_channels, 2 * height, 2 * width)
        noise = starting_noise(request, shape, generator, dtype).to(self.device)
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
